package proxyproto

import (
	"bytes"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger"
)

var (
	a4, b4 = netip.MustParseAddrPort("192.0.2.1:51234"), netip.MustParseAddrPort("198.51.100.7:443")
	a6, b6 = netip.MustParseAddrPort("[2001:db8::1]:51234"), netip.MustParseAddrPort("[2001:db8::2]:443")
)

// Headers as the specification and other implementations write them, byte for byte,
// read and written; every prefix asks for more.
func TestHeaders(t *testing.T) {
	f := func(wire string, v Version, from, to netip.AddrPort) {
		t.Helper()
		if got := Append(nil, v, from, to); string(got) != wire {
			t.Errorf("wrote %q, want %q", got, wire)
		}
		h, n, err := Parse([]byte(wire + "rest"))
		if err != nil || n != len(wire) || h.Version != v || h.Source != from || h.Destination != to || h.Local == from.IsValid() {
			t.Errorf("%q: %+v, %d, %v", wire, h, n, err)
		}
		for i := range wire {
			if _, _, err := Parse([]byte(wire[:i])); !errors.Is(err, ErrShort) {
				t.Errorf("%q: %v", wire[:i], err)
			}
		}
	}
	none := netip.AddrPort{}
	f("PROXY TCP4 192.0.2.1 198.51.100.7 51234 443\r\n", V1, a4, b4)
	f("PROXY TCP6 2001:db8::1 2001:db8::2 51234 443\r\n", V1, a6, b6)
	f("PROXY UNKNOWN\r\n", V1, none, none)
	f(signature+"\x21\x11\x00\x0c\xc0\x00\x02\x01\xc6\x33\x64\x07\xc8\x22\x01\xbb", V2, a4, b4)
	f(signature+"\x21\x21\x00\x24\x20\x01\x0d\xb8"+strings.Repeat("\x00", 11)+"\x01\x20\x01\x0d\xb8"+strings.Repeat("\x00", 11)+"\x02\xc8\x22\x01\xbb", V2, a6, b6)
	f(signature+"\x21\x00\x00\x00", V2, none, none)
}

// What may follow the addresses is skipped.
func TestLenient(t *testing.T) {
	f := func(wire string, local bool) {
		t.Helper()
		h, n, err := Parse([]byte(wire))
		if err != nil || n != len(wire) || h.Local != local {
			t.Errorf("%q: %+v, %d, %v", wire, h, n, err)
		}
	}
	f("PROXY UNKNOWN ffff:f...f:ffff 65535 65535\r\n", true)
	f(signature+"\x20\x11\x00\x03abc", true)
	f(signature+"\x21\x11\x00\x11\xc0\x00\x02\x01\xc6\x33\x64\x07\xc8\x22\x01\xbb\x04\x00\x02ab", false)
}

func TestStrict(t *testing.T) {
	f := func(wire string) {
		t.Helper()
		if h, n, err := Parse([]byte(wire)); !outrigger.IsKind(err, outrigger.Invalid) || n != 0 || h != (Header{}) {
			t.Errorf("%q: %+v, %d, %v", wire, h, n, err)
		}
	}
	f("GET / HTTP/1.1\r\n")
	f("proxy TCP4 1.2.3.4 1.2.3.4 1 1\r\n")
	f("PROXY TCP5 1.2.3.4 1.2.3.4 1 1\r\n")
	f("PROXY TCP4 1.2.3.4 1.2.3.4 1\r\n")
	f("PROXY TCP4 1.2.3.4 1.2.3.4 1 1 1\r\n")
	f("PROXY TCP4  1.2.3.4 1.2.3.4 1 1\r\n")
	f("PROXY TCP4 1.2.3.4 1.2.3.4 01 1\r\n")
	f("PROXY TCP4 1.2.3.4 1.2.3.4 +1 1\r\n")
	f("PROXY TCP4 1.2.3.4 1.2.3.4 65536 1\r\n")
	f("PROXY TCP4 1.2.3 1.2.3.4 1 1\r\n")
	f("PROXY TCP4 ::1 ::1 1 1\r\n")
	f("PROXY TCP6 1.2.3.4 1.2.3.4 1 1\r\n")
	f("PROXY TCP6 fe80::1%lo ::1 1 1\r\n")
	f("PROXY TCP4 1.2.3.4 1.2.3.4 1 1\n" + strings.Repeat("x", 100))
	f(signature + "\x11\x11\x00\x00")
	f(signature + "\x22\x11\x00\x00")
	f(signature + "\x21\x12\x00\x00")
	f(signature + "\x21\x11\x00\x04abcd")
	f(signature + "\x21\x11\xff\xff")
	f(signature + "\x21\x11\x00\x0d\xc0\x00\x02\x01\xc6\x33\x64\x07\xc8\x22\x01\xbb\x04")
}

// FuzzParse: no panic; within the limit there is a decision, which bytes that follow do
// not change; and what was read is read again from what Append makes of it.
func FuzzParse(f *testing.F) {
	for _, v := range []Version{V1, V2} {
		f.Add(Append(nil, v, a4, b4), []byte("x"))
		f.Add(Append(nil, v, a6, b6), []byte("\r\n"))
	}
	f.Add([]byte("PROXY UNKNOWN x\r\n"), []byte{})
	f.Fuzz(func(t *testing.T, b, more []byte) {
		h, n, err := Parse(b)
		if errors.Is(err, ErrShort) {
			if len(b) >= MaxBytes {
				t.Fatalf("undecided after %d bytes", len(b))
			}
			return
		}
		h2, n2, err2 := Parse(append(bytes.Clone(b), more...))
		if h2 != h || n2 != n || (err == nil) != (err2 == nil) {
			t.Fatalf("%+v %d %v; with more bytes %+v %d %v", h, n, err, h2, n2, err2)
		}
		if err != nil || h.Local || h.Source.Addr().Is4() != h.Destination.Addr().Is4() {
			return
		}
		again, m, err := Parse(Append(nil, h.Version, h.Source, h.Destination))
		if err != nil || m == 0 || again != h {
			t.Fatalf("%+v became %+v, %v", h, again, err)
		}
	})
}
