package proxy

import (
	"context"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/cache"
	"github.com/outrigger-mesh/outrigger/internal/wire"
	"github.com/outrigger-mesh/outrigger/proxy/variable"
)

// pinnedBy looks variables that versions of models pin up where reads of the application
// go, which is in this process's memory but for the first time. What is served beyond the
// guarantee of a read may be outdated and says nothing.
func pinnedBy(r variable.Reader) func(context.Context, string, string) (string, bool) {
	return func(ctx context.Context, session, name string) (string, bool) {
		a, err := r.Get(ctx, cache.Request{Key: outrigger.Key{Tenant: outrigger.DefaultTenant, Session: session, Name: name}, Encoding: -1})
		switch {
		case err != nil || a.Stale:
			return "", false
		case !a.Found:
			return "absent", true
		}
		return wire.Dot(a.Variable.GetVersion().GetDot()).String(), true
	}
}
