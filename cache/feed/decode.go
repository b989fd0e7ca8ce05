package feed

import (
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

const (
	// maxSlots bounds the changes that are decoded into memory that is used again.
	maxSlots = 64
	// maxNames bounds the strings that are remembered, each of at most maxName bytes.
	maxNames, maxName = 4096, 256
	// maxText is what is remembered of metadata's values: a source, not a time.
	maxText = 16
)

// decoder decodes FeedFrames into memory it uses again. It knows the fields that a server
// writes, each once; for everything else, bad input included, it asks proto.Unmarshal. So
// what it accepts is what proto.Unmarshal accepts, with the same meaning.
type decoder struct {
	out     pb.FeedFrame
	changes pb.FeedFrame_Changes
	ack     pb.FeedFrame_Ack
	body    pb.Changes
	answer  pb.HeartbeatAck
	slots   []*slot
	used    int
	names   map[string]string
}

// slot is one change with all that it may point to.
type slot struct {
	change           pb.Change
	variable         pb.Variable
	value            pb.Value
	keys             [2]pb.Key  // of the change and of its variable
	versions         [2]version // likewise
	metadata         map[string]string
	head, tail       []byte // the bytes of the variable before and after its key
	created, updated timestamppb.Timestamp
}

type version struct {
	v       pb.Version
	dot     pb.Dot
	context [4]pb.ContextEntry
	list    [4]*pb.ContextEntry
}

// frame decodes one frame; what it returns is valid until the next call, but for its
// strings. Errors have kind Invalid.
func (d *decoder) frame(raw []byte) (*pb.FeedFrame, error) {
	if d.fast(raw) {
		return &d.out, nil
	}
	f := &pb.FeedFrame{}
	if err := proto.Unmarshal(raw, f); err != nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "a feed frame holds no FeedFrame: %v", err)
	}
	return f, nil
}

// appendStored appends the encoding of v without its key, which must be a variable of the last frame, to b as
// it came; false when v is none or was not decoded by hand.
func (d *decoder) appendStored(b []byte, v *pb.Variable) ([]byte, bool) {
	for _, s := range d.slots[:d.used] {
		if &s.variable == v {
			return append(append(b, s.head...), s.tail...), true
		}
	}
	return b, false
}

// fast decodes the usual; false = ask proto.Unmarshal.
func (d *decoder) fast(raw []byte) bool {
	d.out, d.used = pb.FeedFrame{}, 0
	c := cursor{rest: raw}
	for c.field() {
		switch c.tag {
		case 1<<3 | 1:
			d.out.Incarnation = c.fixed64()
		case 2<<3 | 2:
			d.out.Region = d.name(&c)
		case 3<<3 | 2:
			d.body = pb.Changes{Changes: d.body.Changes[:0]}
			d.changes.Changes = &d.body
			d.out.Kind = &d.changes
			d.readChanges(&c)
		case 4<<3 | 2:
			d.answer = pb.HeartbeatAck{}
			d.ack.Ack = &d.answer
			d.out.Kind = &d.ack
			d.readAck(&c)
		case 7 << 3:
			d.out.Selective = c.varint() != 0
		default:
			return false // among them the rare kinds of frames
		}
		if c.tag>>3 == 3 || c.tag>>3 == 4 {
			c.once(3) // members of the oneof: a second one is not merged here
		} else {
			c.once(c.tag >> 3)
		}
	}
	return c.ok()
}

func (d *decoder) readAck(in *cursor) {
	c := in.enter()
	for c.field() {
		switch c.tag {
		case 1<<3 | 1:
			d.answer.Sent = c.fixed64()
		case 2 << 3:
			d.answer.Head = c.varint()
		default:
			c.bad = true
		}
	}
	in.leave(c)
}

func (d *decoder) readChanges(in *cursor) {
	c := in.enter()
	for c.field() {
		switch c.tag {
		case 1 << 3:
			d.body.Previous = c.varint()
		case 2 << 3:
			d.body.Through = c.varint()
		case 3<<3 | 2:
			if d.used == maxSlots {
				in.bad = true
				return
			}
			if d.used == len(d.slots) {
				d.slots = append(d.slots, &slot{})
			}
			s := d.slots[d.used]
			d.used++
			d.readChange(&c, s)
			d.body.Changes = append(d.body.Changes, &s.change)
		default:
			c.bad = true
		}
	}
	in.leave(c)
}

func (d *decoder) readChange(in *cursor, s *slot) {
	s.change = pb.Change{}
	c := in.enter()
	for c.field() {
		switch c.tag {
		case 1 << 3:
			s.change.Scope = pb.Change_Scope(int32(c.varint()))
		case 2<<3 | 2:
			s.change.Key = &s.keys[0]
			d.readKey(&c, &s.keys[0])
		case 3 << 3:
			s.change.Position = c.varint()
		case 4 << 3:
			s.change.KeyPrevious = c.varint()
		case 5 << 3:
			s.change.Deleted = c.varint() != 0
		case 6<<3 | 2:
			s.change.Variable = &s.variable
			d.readVariable(&c, s)
		case 7<<3 | 1:
			s.change.CommittedUnixNano = c.fixed64()
		case 8<<3 | 2:
			s.change.Version = &s.versions[0].v
			d.readVersion(&c, &s.versions[0])
		default:
			c.bad = true
		}
		c.once(c.tag >> 3)
	}
	in.leave(c)
}

func (d *decoder) readVariable(in *cursor, s *slot) {
	v := &s.variable
	*v = pb.Variable{}
	c := in.enter()
	s.head, s.tail = nil, c.rest
	for c.field() {
		switch c.tag {
		case 1<<3 | 2:
			v.Id = d.name(&c)
		case 2<<3 | 2:
			v.Key = &s.keys[1]
			at := len(s.tail) - len(c.rest) - 1
			if s.head = s.tail[:at]; s.tail[at] != 2<<3|2 {
				c.bad = true // a tag of more bytes than it needs
			}
			d.readKey(&c, &s.keys[1])
			s.tail = c.rest
		case 3<<3 | 2:
			v.Value = &s.value
			d.readValue(&c, &s.value)
		case 4<<3 | 2:
			v.ConstraintsJson = d.name(&c)
		case 5<<3 | 2:
			d.readEntry(&c, s)
			continue // there may be more
		case 6<<3 | 2:
			v.Source = d.name(&c)
		case 7<<3 | 2:
			v.Version = &s.versions[1].v
			d.readVersion(&c, &s.versions[1])
		case 8<<3 | 2:
			v.CreatedAt = &s.created
			readTime(&c, &s.created)
		case 9<<3 | 2:
			v.UpdatedAt = &s.updated
			readTime(&c, &s.updated)
		default:
			c.bad = true
		}
		c.once(c.tag >> 3)
	}
	in.leave(c)
}

// readEntry reads one entry of a variable's metadata.
func (d *decoder) readEntry(in *cursor, s *slot) {
	if s.variable.Metadata == nil {
		if s.metadata == nil {
			s.metadata = map[string]string{}
		}
		clear(s.metadata)
		s.variable.Metadata = s.metadata
	}
	var k, v string
	c := in.enter()
	for c.field() {
		switch c.tag {
		case 1<<3 | 2:
			k = d.name(&c)
		case 2<<3 | 2:
			v = d.text(&c, maxText)
		default:
			c.bad = true
		}
	}
	in.leave(c)
	s.metadata[k] = v
}

func (d *decoder) readValue(in *cursor, v *pb.Value) {
	*v = pb.Value{}
	c := in.enter()
	for c.field() {
		switch c.tag {
		case 1<<3 | 2:
			v.Type = d.name(&c)
		case 2<<3 | 2:
			v.Json = c.bytes()
		case 3<<3 | 2:
			v.Binary = c.bytes()
		default:
			c.bad = true
		}
	}
	in.leave(c)
}

func (d *decoder) readKey(in *cursor, k *pb.Key) {
	*k = pb.Key{}
	c := in.enter()
	for c.field() {
		switch c.tag {
		case 1<<3 | 2:
			k.Tenant = d.name(&c)
		case 2<<3 | 2:
			k.Session = d.name(&c)
		case 3<<3 | 2:
			k.Name = d.name(&c)
		default:
			c.bad = true
		}
	}
	in.leave(c)
}

func (d *decoder) readVersion(in *cursor, v *version) {
	v.v = pb.Version{}
	n := 0
	c := in.enter()
	for c.field() {
		switch c.tag {
		case 1 << 3:
			v.v.Counter = int32(c.varint())
		case 2<<3 | 2:
			v.v.Dot, v.dot = &v.dot, pb.Dot{}
			d.readDot(&c, &v.dot)
			c.once(2)
		case 3<<3 | 2:
			if n == len(v.context) {
				in.bad = true
				return
			}
			e := &v.context[n]
			*e = pb.ContextEntry{}
			d.readContext(&c, e)
			v.list[n] = e
			n++
			v.v.Context = v.list[:n]
		case 4<<3 | 1:
			v.v.Hlc = c.fixed64()
		default:
			c.bad = true
		}
	}
	in.leave(c)
}

func (d *decoder) readDot(in *cursor, dot *pb.Dot) {
	c := in.enter()
	for c.field() {
		switch c.tag {
		case 1<<3 | 2:
			dot.Region = d.name(&c)
		case 2<<3 | 1:
			dot.Incarnation = c.fixed64()
		case 3 << 3:
			dot.Position = c.varint()
		default:
			c.bad = true
		}
	}
	in.leave(c)
}

func (d *decoder) readContext(in *cursor, e *pb.ContextEntry) {
	c := in.enter()
	for c.field() {
		switch c.tag {
		case 1<<3 | 2:
			e.Region = d.name(&c)
		case 2 << 3:
			e.Position = c.varint()
		default:
			c.bad = true
		}
	}
	in.leave(c)
}

func readTime(in *cursor, t *timestamppb.Timestamp) {
	*t = timestamppb.Timestamp{}
	c := in.enter()
	for c.field() {
		switch c.tag {
		case 1 << 3:
			t.Seconds = int64(c.varint())
		case 2 << 3:
			t.Nanos = int32(c.varint())
		default:
			c.bad = true
		}
	}
	in.leave(c)
}

// name reads a string. Those of a feed are few and come again and again, so each is
// copied once.
func (d *decoder) name(c *cursor) string { return d.text(c, maxName) }

// text is name for strings of which only those of up to keep bytes come again.
func (d *decoder) text(c *cursor, keep int) string {
	raw := c.bytes()
	if len(raw) == 0 {
		return ""
	}
	if s, ok := d.names[string(raw)]; ok {
		return s
	}
	if !utf8.Valid(raw) {
		c.bad = true
		return ""
	}
	s := string(raw)
	if len(raw) <= keep {
		if d.names == nil || len(d.names) >= maxNames {
			d.names = map[string]string{}
		}
		d.names[s] = s
	}
	return s
}

// cursor walks through one message.
type cursor struct {
	rest []byte
	tag  uint64 // of the present field
	seen uint64 // fields that may not come again
	bad  bool
}

func (c *cursor) ok() bool { return !c.bad }

// field goes to the next field; false at the end, or when something was not understood.
func (c *cursor) field() bool {
	if c.bad || len(c.rest) == 0 {
		return false
	}
	c.tag = c.varint()
	return !c.bad
}

// once fails when this field was there before: then messages would have to be merged.
func (c *cursor) once(field uint64) {
	if bit := uint64(1) << (field & 63); c.seen&bit != 0 {
		c.bad = true
	} else {
		c.seen |= bit
	}
}

func (c *cursor) varint() uint64 {
	v, n := protowire.ConsumeVarint(c.rest)
	if n < 0 {
		c.bad = true
		return 0
	}
	c.rest = c.rest[n:]
	return v
}

func (c *cursor) fixed64() uint64 {
	v, n := protowire.ConsumeFixed64(c.rest)
	if n < 0 {
		c.bad = true
		return 0
	}
	c.rest = c.rest[n:]
	return v
}

// bytes returns a field's bytes, which are those of the frame.
func (c *cursor) bytes() []byte {
	v, n := protowire.ConsumeBytes(c.rest)
	if n < 0 {
		c.bad = true
		return nil
	}
	c.rest = c.rest[n:]
	return v[:len(v):len(v)]
}

// enter begins a message within the message; leave takes its end.
func (c *cursor) enter() cursor { return cursor{rest: c.bytes()} }

func (c *cursor) leave(in cursor) { c.bad = c.bad || in.bad }
