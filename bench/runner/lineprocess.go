package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

// lineProcess is a child that answers each line it is sent with one JSON object. A field
// "error" of it that is not empty fails the question.
type lineProcess[T any] struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func startLines[T any](ctx context.Context, argv []string) (*lineProcess[T], error) {
	p := &lineProcess[T]{cmd: exec.CommandContext(ctx, argv[0], argv[1:]...)}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	var err error
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.out, p.cmd.Stderr = bufio.NewReader(out), new(strings.Builder)
	return p, p.cmd.Start()
}

// next reads the next object.
func (p *lineProcess[T]) next() (v T, err error) {
	line, err := p.out.ReadBytes('\n')
	var said struct{ Error string }
	if err == nil {
		err = errors.Join(json.Unmarshal(line, &v), json.Unmarshal(line, &said))
	}
	if err == nil && said.Error != "" {
		return v, fmt.Errorf("%s: %s", filepath.Base(p.cmd.Path), said.Error)
	}
	if err != nil {
		err = fmt.Errorf("%s: %w; it printed %.300q; %v", filepath.Base(p.cmd.Path), err, line, p.cmd.Stderr)
	}
	return v, err
}

func (p *lineProcess[T]) ask(line string) (v T, err error) {
	if _, err := fmt.Fprintln(p.in, line); err != nil {
		return v, err
	}
	return p.next()
}

// kill ends the child; what it says about that is of no interest.
func (p *lineProcess[T]) kill() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}
