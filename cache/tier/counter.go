package tier

import (
	"sync/atomic"
	"unsafe"
)

const stripes = 64

// counter counts exactly without making the cores fight over one cache line: goroutines
// are spread over stripes by the address of their stack.
type counter struct {
	cells [stripes]struct {
		n atomic.Uint64
		_ [56]byte
	}
}

// add returns the count of the stripe it counted in.
func (c *counter) add() uint64 {
	var here byte
	// Stacks are at least 2 KiB apart; the multiplication spreads larger ones, which are
	// aligned to their size. The address selects a stripe and is not kept.
	a := uint64(uintptr(unsafe.Pointer(&here))) >> 11
	return c.cells[a*0x9e3779b97f4a7c15>>58].n.Add(1)
}

func (c *counter) sum() uint64 {
	var n uint64
	for i := range c.cells {
		n += c.cells[i].n.Load()
	}
	return n
}
