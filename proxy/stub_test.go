package proxy_test

import (
	"context"
	"net"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache"
)

// stub stands for the variables in tests that use none.
type stub struct{}

// nobody is the authority of such tests.
type nobody struct{ pb.VariablesClient }

func (stub) Get(context.Context, cache.Request) (cache.Answer, error) {
	return cache.Answer{}, outrigger.Errorf(outrigger.Unavailable, "there are no variables here")
}

// brokenListener was closed by somebody else.
type brokenListener struct{ net.Listener }

func (brokenListener) Accept() (net.Conn, error) { return nil, net.ErrClosed }
func (brokenListener) Close() error              { return nil }
func (brokenListener) Addr() net.Addr            { return &net.TCPAddr{} }
