//go:build !linux

package loop

import (
	"context"
	"net"
)

// Run accepts from l and serves until ctx ends; see the package comment. It closes l. It
// returns nil after an orderly end. A Server runs one listener at a time.
func (s *Server) Run(ctx context.Context, l net.Listener) error { return s.runGeneric(ctx, l) }
