package main

import (
	"slices"
	"strings"
	"testing"
)

// What is given back: read-only parts of the program as it is on the disk, nothing that
// could be written or was (a relocated page is the process's own).
func TestCleanMappings(t *testing.T) {
	const smaps = `00400000-02000000 r-xp 00000000 fe:00 42                                 /bin/outrigger
Size:              28672 kB
Anonymous:             0 kB
02000000-05000000 r--p 01c00000 fe:00 42                                 /bin/outrigger
Anonymous:             0 kB
05000000-05100000 r--p 04c00000 fe:00 42                                 /bin/outrigger
Anonymous:             4 kB
05100000-05200000 rw-p 04d00000 fe:00 42                                 /bin/outrigger
Anonymous:             0 kB
05200000-05300000 rw-p 00000000 00:00 0 
Anonymous:             0 kB
7f0000000000-7f0000001000 r-xp 00000000 fe:00 7                          /lib/other.so
Anonymous:             0 kB
7f0000002000-7f0000003000 r-xp 00000000 00:00 0                          [vdso]
Anonymous:             0 kB
`
	want := []mapping{{0x400000, 0x2000000}, {0x2000000, 0x5000000}}
	if got := cleanMappings(strings.NewReader(smaps), "/bin/outrigger"); !slices.Equal(got, want) {
		t.Errorf("got %x, want %x", got, want)
	}
}
