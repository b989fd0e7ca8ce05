package shm

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/outrigger-mesh/outrigger"
)

const resizeSeals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW

// createMemory makes an anonymous file of n words, maps it for writing and seals it:
// first against resizing, then, with the writer's mapping in place, against every further
// writable mapping and write. The last seal needs Linux 5.1; without it the mode and the
// read-only descriptor still keep other users out, and Stats says so.
func createMemory(name string, n uint64) (*memory, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) { // MFD_NOEXEC_SEAL needs Linux 6.3
		fd, err = unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Unavailable, err, "memfd_create for the shared table")
	}
	m := &memory{file: os.NewFile(uintptr(fd), name)}
	if err := m.prepare(fd, int64(n)*8); err != nil {
		m.file.Close()
		return nil, err
	}
	return m, nil
}

func (m *memory) prepare(fd int, size int64) error {
	if err := unix.Ftruncate(fd, size); err != nil {
		return outrigger.Wrap(outrigger.Exhausted, err, fmt.Sprintf("sizing the shared table to %d bytes", size))
	}
	if err := unix.Fchmod(fd, 0o400); err != nil {
		return outrigger.Wrap(outrigger.Internal, err, "making the shared table read-only for others")
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, resizeSeals); err != nil {
		return outrigger.Wrap(outrigger.Internal, err, "sealing the size of the shared table")
	}
	if err := m.mapFile(fd, size, unix.PROT_READ|unix.PROT_WRITE); err != nil {
		return err
	}
	_, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_FUTURE_WRITE|unix.F_SEAL_SEAL)
	m.sealed = err == nil
	return nil
}

func (m *memory) mapFile(fd int, size int64, prot int) error {
	b, err := unix.Mmap(fd, 0, int(size), prot, unix.MAP_SHARED)
	if err != nil {
		return outrigger.Wrap(outrigger.Exhausted, err, fmt.Sprintf("mapping %d bytes of shared table", size))
	}
	m.words = viewWords(b)
	runtime.AddCleanup(m, func(b []byte) { _ = unix.Munmap(b) }, b)
	return nil
}

// openMemory maps f read-only. It refuses files that could shrink under the mapping.
func openMemory(f *os.File) (*memory, error) {
	fd := int(f.Fd())
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "%s is not a shared table: it cannot carry seals (%v)", f.Name(), err)
	}
	if seals&resizeSeals != resizeSeals {
		return nil, outrigger.Errorf(outrigger.Invalid, "%s is not sealed against resizing (seals %#x); only tables made by Create can be opened", f.Name(), seals)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, outrigger.Wrap(outrigger.Invalid, err, "shared table "+f.Name())
	}
	if st.Size < pageBytes || st.Size > maxArena*2 || st.Size%pageBytes != 0 {
		return nil, outrigger.Errorf(outrigger.Invalid, "%s is %d bytes, which no shared table has", f.Name(), st.Size)
	}
	m := &memory{}
	return m, m.mapFile(fd, st.Size, unix.PROT_READ)
}

// readOnly opens the file anew, so that the descriptor itself cannot write.
func (m *memory) readOnly() (*os.File, error) {
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", m.file.Fd()))
	return f, outrigger.Wrap(outrigger.Unavailable, err, "reopening the shared table read-only (is /proc mounted?)")
}
