//go:build !dataplane

package main

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// planEvery is how often the deployment plan's file is looked at.
const planEvery = 2 * time.Second

// planName is what a plan is called in the log: its file's name, not where it lies.
func planName(path string) string { return filepath.Base(path) }

// planFile keeps the configured deployment plan as its file says. A file that cannot be
// used is logged once and changes nothing; a change is an event like any other.
type planFile struct {
	path   string
	ready  <-chan struct{}
	apply  func(context.Context, *pb.ConfigureDeploymentRequest) (*pb.DeploymentConfiguration, error)
	logger *slog.Logger
	last   []byte // text that was tried
	missed string // why the file could not be read
}

func (p *planFile) run(ctx context.Context) error {
	select {
	case <-p.ready:
	case <-ctx.Done():
		return nil
	}
	timer := time.NewTicker(planEvery)
	defer timer.Stop()
	for {
		p.look(ctx)
		select {
		case <-timer.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func (p *planFile) look(ctx context.Context) {
	text, err := os.ReadFile(p.path)
	if err != nil {
		if p.missed != err.Error() {
			p.missed = err.Error()
			p.logger.Warn("deployment plan not read; the one before stays", "file", p.path, "error", err)
		}
		return
	}
	p.missed = ""
	if p.last != nil && bytes.Equal(text, p.last) {
		return
	}
	d, err := p.apply(ctx, &pb.ConfigureDeploymentRequest{Name: planName(p.path), Text: text, Actor: "file", Reason: "the file changed"})
	if err != nil {
		p.logger.Error("deployment plan refused; the one before stays", "file", p.path, "error", err)
	} else {
		p.logger.Info("deployment plan in force", "file", p.path, "sha256", d.GetSha256(), "notes", len(d.GetNotes()))
	}
	p.last = text
}
