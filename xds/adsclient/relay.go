package adsclient

import (
	"context"
	"slices"
	"time"

	"github.com/outrigger-mesh/outrigger/internal/pause"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/internal/upstream"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// greeted waits for the first words of a relay; cancel ends the stream. The error is errCut
// for a relay that is not linked where that matters.
func (s *stream) greeted(ads upstream.Stream, cancel func()) error {
	clock := time.AfterFunc(relayTimeout, cancel)
	defer clock.Stop()
	header, err := ads.Header()
	if err != nil {
		return err
	}
	if len(header.Get(xds.RelayHeader)) == 0 { // the stream ended without a word, or speaks otherwise
		_, err := ads.Recv()
		return err
	}
	if s.linked && !slices.Contains(header.Get(xds.RelayHeader), xds.RelayLinked) {
		return errCut
	}
	return nil
}

// heard counts an answered probe: the control plane was there after it was asked.
func (s *stream) heard() {
	s.contact(s.asked)
	s.asked, s.missed = time.Time{}, 0
	if s.relay && s.synced && s.c.policy.Load() != nil {
		s.vouched = true
		s.c.update(func(st *Status) { st.Live, st.Source = true, SourceADS })
	}
}

// outdated reports whether a relay that is being joined has an older policy than the one in
// force, as one may that lags behind: going back to what was replaced would undo, for one, a
// rollback that is recorded as complete. What is newer may still come.
func (s *stream) outdated() bool {
	if !s.relay || s.synced || s.c.policy.Load() == nil {
		return false
	}
	p, err := translate.DecodeMesh(&s.view.res)
	if err != nil || p.Position >= s.c.status.Load().Position {
		return false
	}
	s.c.log.Info("the relay has an older policy; waiting", "position", p.Position, "in_force", s.c.status.Load().Position)
	return true
}

// watchRelay closes home when the relay is linked to the control plane.
func (c *Client) watchRelay(ctx context.Context, home chan<- struct{}) {
	for {
		if !pause.For(ctx, pause.About(homeEvery)) {
			return
		}
		if c.relayLinked(ctx) {
			close(home)
			return
		}
	}
}

// relayLinked asks the relay.
func (c *Client) relayLinked(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, relayTimeout)
	defer cancel()
	conn, closer, err := c.opt.Relay(ctx)
	if err != nil {
		return false
	}
	if closer != nil {
		defer closer.Close() // nothing was sent that could be lost
	}
	ads, err := upstream.Open(ctx, conn)
	if err != nil {
		return false
	}
	header, err := ads.Header()
	return err == nil && slices.Contains(header.Get(xds.RelayHeader), xds.RelayLinked)
}
