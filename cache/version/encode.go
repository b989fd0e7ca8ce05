package version

import (
	"encoding/binary"
	"maps"
	"slices"

	"github.com/outrigger-mesh/outrigger"
)

// MaxRegions bounds a decoded vector. It is far above any real mesh and keeps a
// hostile length prefix from reserving memory.
const MaxRegions = 1024

// AppendVector appends the canonical encoding of v to dst: the number of entries,
// then per entry, in ascending byte order of the region, the region's length, its
// bytes and the position. Numbers are unsigned varints (Protocol Buffers encoding).
// Zero positions are left out. A vector of one region with a two-letter name takes
// 5 to 14 bytes.
func AppendVector(dst []byte, v map[string]uint64) []byte {
	n := 0
	for _, p := range v {
		if p > 0 {
			n++
		}
	}
	dst = binary.AppendUvarint(dst, uint64(n))
	for _, r := range slices.Sorted(maps.Keys(v)) {
		if v[r] == 0 {
			continue
		}
		dst = appendString(dst, r)
		dst = binary.AppendUvarint(dst, v[r])
	}
	return dst
}

// DecodeVector reads one vector from the front of b and returns what follows it.
// Errors have kind Invalid.
func DecodeVector(b []byte) (v map[string]uint64, rest []byte, err error) {
	d := decoder{b: b}
	v = d.vector()
	if d.err != nil {
		return nil, nil, d.err
	}
	return v, d.b, nil
}

// AppendVersion appends the canonical encoding of v: counter, dot (region,
// incarnation, position), HLC, then the context as AppendVector writes it.
func AppendVersion(dst []byte, v outrigger.Version) []byte {
	dst = binary.AppendUvarint(dst, uint64(uint32(v.Counter)))
	dst = appendString(dst, v.Dot.Region)
	dst = binary.AppendUvarint(dst, v.Dot.Incarnation)
	dst = binary.AppendUvarint(dst, v.Dot.Position)
	dst = binary.AppendUvarint(dst, v.HLC)
	return AppendVector(dst, v.Context)
}

// DecodeVersion reads one version from the front of b and returns what follows it.
// Errors have kind Invalid.
func DecodeVersion(b []byte) (v outrigger.Version, rest []byte, err error) {
	d := decoder{b: b}
	counter := d.uvarint("counter")
	if counter > 1<<32-1 {
		d.fail("counter %d does not fit 32 bits", counter)
	}
	v.Counter = int32(uint32(counter))
	v.Dot.Region = d.region()
	v.Dot.Incarnation = d.uvarint("incarnation")
	v.Dot.Position = d.uvarint("position")
	v.HLC = d.uvarint("hlc")
	v.Context = d.vector()
	if d.err != nil {
		return outrigger.Version{}, nil, d.err
	}
	return v, d.b, nil
}

func appendString(dst []byte, s string) []byte {
	dst = binary.AppendUvarint(dst, uint64(len(s)))
	return append(dst, s...)
}

// decoder consumes b; after the first failure it returns zero values and keeps err.
type decoder struct {
	b   []byte
	err error
}

func (d *decoder) fail(format string, args ...any) {
	if d.err == nil {
		d.err = outrigger.Errorf(outrigger.Invalid, "version encoding: "+format, args...)
	}
	d.b = nil
}

func (d *decoder) uvarint(field string) uint64 {
	if d.err != nil {
		return 0
	}
	x, n := binary.Uvarint(d.b)
	switch {
	case n <= 0:
		d.fail("%s is cut short or longer than 64 bits", field)
		return 0
	case n > 1 && d.b[n-1] == 0:
		d.fail("%s is not in its shortest form", field)
		return 0
	}
	d.b = d.b[n:]
	return x
}

func (d *decoder) region() string {
	n := d.uvarint("region length")
	if n > outrigger.MaxNameBytes || n > uint64(len(d.b)) {
		d.fail("region of %d bytes; %d are left and the limit is %d", n, len(d.b), outrigger.MaxNameBytes)
		return ""
	}
	s := string(d.b[:n])
	d.b = d.b[n:]
	return s
}

func (d *decoder) vector() map[string]uint64 {
	n := d.uvarint("vector length")
	if n > MaxRegions {
		d.fail("vector of %d regions, the limit is %d", n, MaxRegions)
	}
	if d.err != nil || n == 0 {
		return nil
	}
	v := make(map[string]uint64, n)
	last, first := "", true
	for range n {
		r := d.region()
		p := d.uvarint("position")
		switch {
		case d.err != nil:
			return nil
		case !first && r <= last:
			d.fail("region %q follows %q; regions must ascend", r, last)
			return nil
		case p == 0:
			d.fail("region %q has position 0, which is written by leaving it out", r)
			return nil
		}
		v[r], last, first = p, r, false
	}
	return v
}
