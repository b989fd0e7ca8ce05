//go:build linux

package shm

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// intruderProcess attaches like a reader, proves that it can read, and then stores one
// word through its mapping.
func intruderProcess(table *os.File) error {
	r, err := Open(table)
	if err != nil {
		return err
	}
	e, value := r.Get("default/s/x", nil)
	fmt.Printf("read %s %s\n", e.State, value)
	r.arena[0]++ // the processor refuses
	fmt.Println("wrote")
	return nil
}

// A reader that stores through its mapping dies of it, and the table is unharmed.
func TestWriteThroughTheReadersMappingFaults(t *testing.T) {
	w, err := Create(Options{Bytes: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := w.Put("default/s/x", Present, []byte("value")); err != nil {
		t.Fatal(err)
	}
	f, err := w.Descriptor()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := role(t, "intruder", f)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	died, ok := err.(*exec.ExitError)
	if !ok {
		t.Fatalf("the intruder ended with %v", err)
	}
	// Go's runtime turns the signal into a fatal error that names it; a process without
	// such a handler is ended by the signal itself.
	bySignal := died.Sys().(syscall.WaitStatus).Signal() == syscall.SIGSEGV
	if !bySignal && !strings.Contains(errs.String(), "[signal SIGSEGV: segmentation violation") {
		t.Errorf("the intruder died of something else: %v\n%s", err, errs.String())
	}
	if got := out.String(); got != "read present value\n" {
		t.Errorf("the intruder said %q", got)
	}
	if e, value := w.Reader().Get("default/s/x", nil); e.State != Present || string(value) != "value" {
		t.Errorf("afterwards the table holds %v %q", e.State, value)
	}
}
