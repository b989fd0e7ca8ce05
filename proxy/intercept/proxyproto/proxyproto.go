// Package proxyproto reads and writes the PROXY protocol, versions 1 and 2: the line or
// block a load balancer puts before a connection to say whose it is
// (https://www.haproxy.org/download/2.9/doc/proxy-protocol.txt).
//
// Parse is strict: a header is either exactly as the specification writes it or an
// error, because whoever can get a wrong address accepted can pretend to be somebody
// else. The caller decides from whom a header is believed, and must then demand one.
// Bytes may arrive in any pieces; at most MaxBytes are looked at.
package proxyproto

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"strconv"
	"strings"

	"github.com/outrigger-mesh/outrigger"
)

// Version of the protocol.
type Version uint8

// The versions.
const (
	V1 Version = 1 // text
	V2 Version = 2 // binary
)

// Limits: a version 1 line (§2.1 of the specification), and what is accepted of a
// version 2 header with its extensions.
const (
	maxLine  = 107
	MaxBytes = 16 + 2048
)

// ErrShort says that more bytes are needed.
var ErrShort = errors.New("proxyproto: more bytes are needed")

// Header is what a PROXY header says. Local means that the balancer speaks for itself,
// as in health checks, or does not know the client; the addresses are then invalid.
type Header struct {
	Version             Version
	Local               bool
	Source, Destination netip.AddrPort
}

const signature = "\r\n\r\n\x00\r\nQUIT\n"

// Parse reads the header at the start of b and returns its length. Errors: ErrShort, or
// kind Invalid.
func Parse(b []byte) (h Header, n int, err error) {
	switch {
	case bytes.HasPrefix(b, []byte(signature)):
		return parse2(b)
	case bytes.HasPrefix(b, []byte("PROXY ")):
		return parse1(b)
	case strings.HasPrefix(signature, string(b)), strings.HasPrefix("PROXY ", string(b)):
		return h, 0, ErrShort
	}
	return h, 0, invalid("it does not begin with one")
}

func invalid(format string, args ...any) error {
	return outrigger.Errorf(outrigger.Invalid, "PROXY header: "+format, args...)
}

func parse1(b []byte) (h Header, n int, err error) {
	line, _, ok := bytes.Cut(b[:min(len(b), maxLine)], []byte("\r\n"))
	if !ok {
		if len(b) >= maxLine {
			return h, 0, invalid("no end of line within %d bytes", maxLine)
		}
		return h, 0, ErrShort
	}
	h.Version = V1
	f := strings.Split(string(line), " ")
	if f[1] == "UNKNOWN" {
		h.Local = true
		return h, len(line) + 2, nil
	}
	if len(f) != 6 || f[1] != "TCP4" && f[1] != "TCP6" {
		return Header{}, 0, invalid("version 1 line %q", line)
	}
	if h.Source, err = endpoint(f[1], f[2], f[4]); err == nil {
		h.Destination, err = endpoint(f[1], f[3], f[5])
	}
	if err != nil {
		return Header{}, 0, err
	}
	return h, len(line) + 2, nil
}

// endpoint reads an address of the family and a port without leading zeros.
func endpoint(family, host, port string) (netip.AddrPort, error) {
	a, err := netip.ParseAddr(host)
	p, perr := strconv.ParseUint(port, 10, 16)
	if err != nil || perr != nil || a.Zone() != "" || a.Is4() != (family == "TCP4") || len(port) > 1 && port[0] == '0' || port[0] == '+' {
		return netip.AddrPort{}, invalid("%s address %q port %q", family, host, port)
	}
	return netip.AddrPortFrom(a.Unmap(), uint16(p)), nil
}

func parse2(b []byte) (h Header, n int, err error) {
	if len(b) < 16 {
		return h, 0, ErrShort
	}
	command, family := b[12], b[13]
	length := int(binary.BigEndian.Uint16(b[14:]))
	switch {
	case command != 0x20 && command != 0x21:
		return h, 0, invalid("version 2 command %#x", command)
	case 16+length > MaxBytes:
		return h, 0, invalid("version 2 of %d bytes, the limit is %d", 16+length, MaxBytes)
	case len(b) < 16+length:
		return h, 0, ErrShort
	}
	h.Version = V2
	body := b[16 : 16+length]
	if command == 0x20 { // LOCAL: whatever follows is skipped
		h.Local = true
		return h, 16 + length, nil
	}
	size := 0
	switch family {
	case 0x11:
		size = 4
	case 0x21:
		size = 16
	case 0x00:
		h.Local = true
		return h, 16 + length, nil
	default:
		return Header{}, 0, invalid("version 2 family %#x; TCP over IPv4 or IPv6 is served", family)
	}
	if len(body) < 2*size+4 {
		return Header{}, 0, invalid("version 2 body of %d bytes for family %#x", len(body), family)
	}
	src, _ := netip.AddrFromSlice(body[:size])
	dst, _ := netip.AddrFromSlice(body[size : 2*size])
	h.Source = netip.AddrPortFrom(src.Unmap(), binary.BigEndian.Uint16(body[2*size:]))
	h.Destination = netip.AddrPortFrom(dst.Unmap(), binary.BigEndian.Uint16(body[2*size+2:]))
	if !extensions(body[2*size+4:]) {
		return Header{}, 0, invalid("version 2 extensions do not fill its length")
	}
	return h, 16 + length, nil
}

// extensions checks the framing of type-length-value fields; their content is not used.
func extensions(b []byte) bool {
	for len(b) > 0 {
		if len(b) < 3 {
			return false
		}
		n := 3 + int(binary.BigEndian.Uint16(b[1:]))
		if n > len(b) {
			return false
		}
		b = b[n:]
	}
	return true
}

// Append writes a header for a connection from one address to another. Addresses of
// different families, or none, are written as unknown.
func Append(b []byte, v Version, from, to netip.AddrPort) []byte {
	from, to = netip.AddrPortFrom(from.Addr().Unmap().WithZone(""), from.Port()), netip.AddrPortFrom(to.Addr().Unmap().WithZone(""), to.Port())
	known := from.IsValid() && to.IsValid() && from.Addr().Is4() == to.Addr().Is4()
	if v == V1 {
		switch {
		case !known:
			return append(b, "PROXY UNKNOWN\r\n"...)
		case from.Addr().Is4():
			b = append(b, "PROXY TCP4 "...)
		default:
			b = append(b, "PROXY TCP6 "...)
		}
		b = from.Addr().AppendTo(b)
		b = append(b, ' ')
		b = to.Addr().AppendTo(b)
		b = strconv.AppendUint(append(b, ' '), uint64(from.Port()), 10)
		b = strconv.AppendUint(append(b, ' '), uint64(to.Port()), 10)
		return append(b, "\r\n"...)
	}
	b = append(b, signature...)
	if !known {
		return append(b, 0x21, 0x00, 0, 0)
	}
	family, length := byte(0x11), uint16(12)
	if from.Addr().Is6() {
		family, length = 0x21, 36
	}
	b = binary.BigEndian.AppendUint16(append(b, 0x21, family), length)
	b = append(append(b, from.Addr().AsSlice()...), to.Addr().AsSlice()...)
	b = binary.BigEndian.AppendUint16(b, from.Port())
	return binary.BigEndian.AppendUint16(b, to.Port())
}
