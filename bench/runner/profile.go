package main

import (
	"errors"
	"os"
	"path/filepath"
	"runtime/pprof"
	"runtime/trace"
)

// startProfile writes NAME.pprof and NAME.trace into the directory the flags name until
// stop is called; without one it does nothing. The trace shows what waited for a core, and
// for how long, which a CPU profile cannot.
func (l lagFlags) startProfile(name string) (stop func() error, err error) {
	if l.profile == "" {
		return func() error { return nil }, nil
	}
	cpu, err0 := os.Create(filepath.Join(l.profile, name+".pprof"))
	events, err1 := os.Create(filepath.Join(l.profile, name+".trace"))
	if err := errors.Join(err0, err1); err != nil {
		return nil, err
	}
	if err := errors.Join(pprof.StartCPUProfile(cpu), trace.Start(events)); err != nil {
		return nil, err
	}
	return func() error {
		pprof.StopCPUProfile()
		trace.Stop()
		return errors.Join(cpu.Close(), events.Close())
	}, nil
}
