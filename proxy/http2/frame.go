package http2

import "encoding/binary"

// Frame types and flags, RFC 9113 section 6.
const (
	frameData uint8 = iota
	frameHeaders
	framePriority
	frameReset
	frameSettings
	framePush
	framePing
	frameGoAway
	frameWindow
	frameContinuation
)

const (
	flagEndStream  = 0x1
	flagAck        = 0x1
	flagEndHeaders = 0x4
	flagPadded     = 0x8
	flagPriority   = 0x20
)

// Settings, RFC 9113 section 6.5.2.
const (
	settingTableSize     = 0x1
	settingPush          = 0x2
	settingMaxStreams    = 0x3
	settingInitialWindow = 0x4
	settingMaxFrame      = 0x5
	settingMaxHeaderList = 0x6
)

const (
	preface       = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	headLength    = 9
	maxFrame      = 16384 // payload we accept: the smallest bound the protocol knows
	defaultWindow = 65535
	maxWindow     = 1<<31 - 1
	maxStreamID   = 1<<31 - 1
)

// code is an error code, RFC 9113 section 7.
type code uint32

const (
	codeNone code = iota
	codeProtocol
	codeInternal
	codeFlowControl
	codeSettingsTimeout
	codeStreamClosed
	codeFrameSize
	codeRefused
	codeCancel
	codeCompression
	codeConnect
	codeCalm
)

// connError ends a connection.
type connError struct {
	code code
	text string
}

func (e connError) Error() string { return "http2: " + e.text }

// frameHead is the fixed part of a frame.
type frameHead struct {
	length int
	kind   uint8
	flags  uint8
	stream uint32
}

// parseHead reads a frame head; b has at least headLength bytes.
func parseHead(b []byte) frameHead {
	return frameHead{length: int(b[0])<<16 | int(b[1])<<8 | int(b[2]), kind: b[3], flags: b[4],
		stream: binary.BigEndian.Uint32(b[5:]) & maxStreamID}
}

func appendHead(dst []byte, length int, kind, flags uint8, stream uint32) []byte {
	return append(dst, byte(length>>16), byte(length>>8), byte(length), kind, flags,
		byte(stream>>24), byte(stream>>16), byte(stream>>8), byte(stream))
}

func appendReset(dst []byte, stream uint32, c code) []byte {
	return binary.BigEndian.AppendUint32(appendHead(dst, 4, frameReset, 0, stream), uint32(c))
}

func appendWindow(dst []byte, stream uint32, n int) []byte {
	return binary.BigEndian.AppendUint32(appendHead(dst, 4, frameWindow, 0, stream), uint32(n))
}

func appendGoAway(dst []byte, last uint32, c code, text string) []byte {
	dst = appendHead(dst, 8+len(text), frameGoAway, 0, 0)
	dst = binary.BigEndian.AppendUint32(dst, last)
	dst = binary.BigEndian.AppendUint32(dst, uint32(c))
	return append(dst, text...)
}

func appendSetting(dst []byte, id uint16, v uint32) []byte {
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16(dst, id), v)
}

// appendFields writes a header block as HEADERS and, where the peer's frames are too
// small for it, CONTINUATION; flags may hold flagEndStream.
func appendFields(dst []byte, stream uint32, flags uint8, block []byte, limit int) []byte {
	kind := frameHeaders
	for len(block) > limit {
		dst = append(appendHead(dst, limit, kind, flags, stream), block[:limit]...)
		block, kind, flags = block[limit:], frameContinuation, 0
	}
	return append(appendHead(dst, len(block), kind, flags|flagEndHeaders, stream), block...)
}

// unpad strips the padding of a DATA or HEADERS payload (RFC 9113 section 6.1).
func unpad(flags uint8, p []byte) ([]byte, bool) {
	if flags&flagPadded == 0 {
		return p, true
	}
	if len(p) == 0 || int(p[0]) >= len(p) {
		return nil, false
	}
	return p[1 : len(p)-int(p[0])], true
}
