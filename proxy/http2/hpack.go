package http2

import (
	"bytes"
	"strconv"

	"golang.org/x/net/http2/hpack"
)

// neutral reports whether decoding a header block leaves the dynamic table as it is: no
// literal with incremental indexing, no change of the table's size (RFC 7541 section 6).
// Of a malformed block it may say either; the decoder refuses it.
func neutral(b []byte) bool {
	for len(b) > 0 {
		var n uint64
		var ok bool
		switch c := b[0]; {
		case c&0x80 != 0:
			_, b, ok = readInt(b, 7)
		case c&0xe0 != 0:
			return false
		default:
			if n, b, ok = readInt(b, 4); ok && n == 0 {
				b, ok = skipString(b)
			}
			if ok {
				b, ok = skipString(b)
			}
		}
		if !ok {
			return false
		}
	}
	return true
}

// readInt reads an integer with a prefix of n bits (RFC 7541 section 5.1).
func readInt(b []byte, n uint) (v uint64, rest []byte, ok bool) {
	if len(b) == 0 {
		return 0, nil, false
	}
	mask := uint64(1)<<n - 1
	if v = uint64(b[0]) & mask; v < mask {
		return v, b[1:], true
	}
	for i, c := range b[1:] {
		if i > 4 {
			return 0, nil, false
		}
		v += uint64(c&0x7f) << (7 * uint(i))
		if c&0x80 == 0 {
			return v, b[i+2:], true
		}
	}
	return 0, nil, false
}

func skipString(b []byte) ([]byte, bool) {
	n, rest, ok := readInt(b, 7)
	if !ok || n > uint64(len(rest)) {
		return nil, false
	}
	return rest[n:], true
}

// appendInt writes an integer with a prefix of n bits; first holds the bits above it.
func appendInt(dst []byte, first byte, n uint, v uint64) []byte {
	mask := uint64(1)<<n - 1
	if v < mask {
		return append(dst, first|byte(v))
	}
	dst = append(dst, first|byte(mask))
	for v -= mask; v >= 0x80; v >>= 7 {
		dst = append(dst, byte(v)|0x80)
	}
	return append(dst, byte(v))
}

// staticName is the index of a name in HPACK's static table (RFC 7541 appendix A), for
// names answers often have; 0 = none.
func staticName(name string) uint64 {
	switch name {
	case ":status":
		return 8
	case "cache-control":
		return 24
	case "content-encoding":
		return 26
	case "content-length":
		return 28
	case "content-type":
		return 31
	case "date":
		return 33
	case "etag":
		return 34
	case "location":
		return 46
	case "server":
		return 54
	case "vary":
		return 59
	}
	return 0
}

// AppendField appends a field to a header block. It uses no dynamic table, so the block
// means the same on every connection. name is in lower case.
func AppendField(dst []byte, name, value string) []byte {
	if i := staticName(name); i > 0 {
		dst = appendInt(dst, 0, 4, i)
	} else {
		dst = append(appendInt(append(dst, 0), 0, 7, uint64(len(name))), name...)
	}
	return append(appendInt(dst, 0, 7, uint64(len(value))), value...)
}

// AppendStatus appends the :status pseudo-field, with which the block of an answer begins.
func AppendStatus(dst []byte, status int) []byte {
	for i, s := range [...]int{200, 204, 206, 304, 400, 404, 500} {
		if s == status {
			return append(dst, 0x88+byte(i))
		}
	}
	return AppendField(dst, ":status", strconv.Itoa(status))
}

// blocks decodes the header blocks of one connection, in order.
type blocks struct {
	dec    *hpack.Decoder
	fields []hpack.HeaderField // of the block being decoded
	size   int                 // as section 6.5.2 counts
	memo   [8]struct {
		block []byte
		head  *Head
	}
	turn int
}

func newBlocks() *blocks {
	b := &blocks{}
	b.dec = hpack.NewDecoder(4096, b.emit)
	return b
}

// emit keeps fields up to the limit; beyond it only the dynamic table is kept right.
func (b *blocks) emit(f hpack.HeaderField) {
	if b.size += int(f.Size()); b.size <= maxFields {
		b.fields = append(b.fields, f)
	}
}

// recall returns what an equal block meant, nil if it has to be decoded.
func (b *blocks) recall(block []byte) *Head {
	for i := range b.memo {
		if m := &b.memo[i]; m.head != nil && bytes.Equal(m.block, block) {
			return m.head
		}
	}
	return nil
}

// decode decodes a block into b.fields.
func (b *blocks) decode(block []byte) error {
	clear(b.fields)
	b.fields, b.size = b.fields[:0], 0
	if !neutral(block) {
		for i := range b.memo {
			b.memo[i].head = nil
		}
	}
	if _, err := b.dec.Write(block); err != nil {
		return err
	}
	return b.dec.Close()
}

// maxMemo bounds the blocks that are remembered, in bytes each.
const maxMemo = 2048

// remember keeps the meaning of a block that has just been decoded.
func (b *blocks) remember(block []byte, h *Head) {
	if len(block) > maxMemo || !neutral(block) {
		return
	}
	m := &b.memo[b.turn%len(b.memo)]
	b.turn++
	m.block, m.head = append(m.block[:0], block...), h
}
