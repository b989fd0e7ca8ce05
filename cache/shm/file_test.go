//go:build linux

package shm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cespare/xxhash/v2"
	"golang.org/x/sys/unix"

	"github.com/outrigger-mesh/outrigger"
)

var update = flag.Bool("update", false, "rewrite golden files")

func TestDescriptorCannotWrite(t *testing.T) {
	w := mustCreate(t, Options{Bytes: 4096})
	f, err := w.Descriptor()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd := int(f.Fd())
	if _, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
		t.Error("mapped for writing")
	}
	if _, err := unix.Pwrite(fd, []byte("x"), 0); err == nil {
		t.Error("wrote")
	}
	for _, size := range []int64{0, 1 << 20} {
		if err := unix.Ftruncate(fd, size); err == nil {
			t.Errorf("resized to %d", size)
		}
	}
	b, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(b)
	if err := unix.Mprotect(b, unix.PROT_READ|unix.PROT_WRITE); err == nil {
		t.Error("made a mapping writable")
	}
	if !w.Stats().WriteSealed {
		t.Skip("this kernel has no F_SEAL_FUTURE_WRITE: only the descriptor's mode protects the table")
	}
	// Not even the owner, or root, can come back in by reopening the file.
	if g, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), os.O_RDWR, 0); err == nil {
		defer g.Close()
		if _, err := unix.Mmap(int(g.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
			t.Error("reopened and mapped for writing")
		}
		if _, err := g.WriteAt([]byte("x"), 0); err == nil {
			t.Error("reopened and wrote")
		}
	}
}

// sealedFile makes a memfd with this content, sealed against resizing or not.
func sealedFile(t *testing.T, content []byte, seal bool) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("foreign", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "foreign")
	t.Cleanup(func() { f.Close() })
	if _, err := f.Write(content); err != nil {
		t.Fatal(err)
	}
	if seal {
		if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, resizeSeals); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

func TestOpenRefusesForeignFiles(t *testing.T) {
	w := mustCreate(t, Options{Heap: true, Bytes: 4096, Slots: 256})
	good := make([]byte, len(w.mem.words)*8)
	copySum(good, w.mem.words)
	if _, err := Open(sealedFile(t, good, true)); err != nil {
		t.Fatalf("the unchanged table: %v", err)
	}
	change := func(word int, v uint64, resum bool) []byte {
		b := bytes.Clone(good)
		binary.LittleEndian.PutUint64(b[8*word:], v)
		if resum {
			binary.LittleEndian.PutUint64(b[8*hdrSum:], xxhash.Sum64(b[:8*hdrSum]))
		}
		return b
	}
	for _, c := range []struct {
		name, says string
		file       *os.File
	}{
		{"not sealed", "sealed", sealedFile(t, good, false)},
		{"empty", "bytes", sealedFile(t, nil, true)},
		{"cut off", "bytes", sealedFile(t, good[:8192], true)},
		{"magic", "magic", sealedFile(t, change(hdrMagic, 1, true), true)},
		{"later layout", "layout version", sealedFile(t, change(hdrLayout, layoutVersion+1, true), true)},
		{"flipped bit", "checksum", sealedFile(t, change(hdrSlots, 129, false), true)},
		{"few slots", "damaged", sealedFile(t, change(hdrSlots, 127, true), true)},
		{"huge arena", "damaged", sealedFile(t, change(hdrArena, 1<<60, true), true)},
		{"sizes disagree", "geometry", sealedFile(t, change(hdrSlots, 512, true), true)},
	} {
		if _, err := Open(c.file); !outrigger.IsKind(err, outrigger.Invalid) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want kind invalid naming %q", c.name, err, c.says)
		}
	}
	plain, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	if _, err := Open(plain); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("an ordinary file: %v", err)
	}
}

// A flipped bit in a record is noticed and counted, never returned.
func TestDamageIsNoticed(t *testing.T) {
	w := mustCreate(t, Options{Heap: true, Bytes: 4096, Slots: 256})
	r := w.Reader()
	mustPut(t, w, "key", Present, strings.Repeat("v", 100))
	n := recordWords(3, 100)
	for word := range n {
		for bit := range 64 {
			w.arena[word] ^= 1 << bit
			e, got := r.Get("key", nil)
			w.arena[word] ^= 1 << bit
			if e.State != Absent || len(got) != 0 {
				t.Fatalf("word %d bit %d: read %+v %q", word, bit, e, got)
			}
		}
	}
	if r.Corrupt() == 0 {
		t.Fatal("damage was not counted")
	}
	if e, _ := r.Get("key", nil); e.State != Present {
		t.Fatalf("repaired: %+v", e)
	}
}

// The layout is a contract between releases on one node: its bytes may change only
// together with layoutVersion.
func TestGoldenLayout(t *testing.T) {
	w, err := create(Options{Heap: true, Bytes: 4096, Slots: 256, Generation: 9}, 1_000_000)
	if err != nil {
		t.Fatal(err)
	}
	w.SetLease(1234)
	w.SetHead(77, 5)
	mustPut(t, w, "default/s/a", Present, "first value")
	mustPut(t, w, "default/s/b", Negative, "")
	mustPut(t, w, "default/s/c", Present, "0123456789abcdef")
	w.Invalidate("default/s/c")
	mustPut(t, w, "default/s/d", Present, "gone")
	w.Remove("default/s/d")
	var got strings.Builder
	for i, v := range w.mem.words {
		if v != 0 {
			fmt.Fprintf(&got, "%04x %016x\n", i*8, v)
		}
	}
	path := filepath.Join("testdata", "layout.golden")
	if *update {
		if err := errors.Join(os.MkdirAll("testdata", 0o755), os.WriteFile(path, []byte(got.String()), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got.String() != string(want) {
		t.Errorf("layout changed; raise layoutVersion and run with -update:\n%s", got.String())
	}
}

// Looking for what a little used table holds makes no page of it real: those that nobody
// wrote stay without memory.
func TestScanTakesNoMemory(t *testing.T) {
	w := mustCreate(t, Options{Bytes: 64 << 20})
	for i := range 100 {
		mustPut(t, w, fmt.Sprintf("key-%d", i), Present, strings.Repeat("v", 200))
	}
	f, err := w.Descriptor()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	blocks := func() int64 {
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks
	}
	r, err := Open(f)
	if err != nil {
		t.Fatal(err)
	}
	before := blocks()
	if got := r.Scan(0, 0).all(); len(got) != 100 {
		t.Errorf("%d keys found", len(got))
	}
	if after := blocks(); after != before {
		t.Errorf("the table had %d KiB, and %d after a scan", before/2, after/2)
	}
}
