package shm

import (
	"os"
	"unsafe"
)

// memory is one table's words. Writers and readers point at it and it unmaps itself when
// nothing does any more.
type memory struct {
	words  []uint64
	file   *os.File // the writer's descriptor; nil on the heap and for readers
	sealed bool     // no new writable mapping or write is possible, not even by this user
}

func heapMemory(n uint64) *memory { return &memory{words: make([]uint64, n)} }

// viewWords reinterprets page-aligned mapped bytes as words.
func viewWords(b []byte) []uint64 {
	return unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/8)
}
