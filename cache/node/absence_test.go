package node

import (
	"bytes"
	"testing"

	"github.com/outrigger-mesh/outrigger"
)

func TestAbsence(t *testing.T) {
	a := Absence{SessionExists: true, AsOf: outrigger.Dot{Region: "eu", Incarnation: 3, Position: 0x0102}}
	b := a.Append([]byte("x"))[1:]
	if want := []byte{1, 2, 1, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 'e', 'u'}; !bytes.Equal(b, want) {
		t.Fatalf("payload %v, want %v", b, want)
	}
	if got, ok := ParseAbsence(b); !ok || got != a {
		t.Errorf("read back %+v, %v", got, ok)
	}
	for _, bad := range [][]byte{nil, b[:16], append(b, make([]byte, outrigger.MaxNameBytes)...), append([]byte{2}, b[1:]...)} {
		if got, ok := ParseAbsence(bad); ok {
			t.Errorf("%v was read as %+v", bad, got)
		}
	}
}
