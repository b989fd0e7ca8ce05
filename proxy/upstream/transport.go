package upstream

import (
	"context"
	"net"
	"net/http"
	"time"
)

// DialFunc opens a connection; network is "tcp", address "host:port".
type DialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// TransportOptions configure NewTransport. Zero fields take the defaults below.
type TransportOptions struct {
	// Dial replaces the network; nil = TCP with Guard applied before connect.
	Dial DialFunc
	// Guard is asked for every address dialled; nil allows all.
	Guard *Guard
	// DialTimeout bounds connect, default 5 s. TLSTimeout the handshake, default 10 s.
	DialTimeout, TLSTimeout time.Duration
	// HeadTimeout bounds the wait for a response head; 0 = the request's context only,
	// because a model may think for minutes before it answers.
	HeadTimeout time.Duration
	// IdleTimeout closes unused connections, default 90 s.
	IdleTimeout time.Duration
	// MaxIdlePerHost and MaxIdle bound kept connections, default 256 and 2048.
	MaxIdlePerHost, MaxIdle int
	// MaxPerHost bounds connections to one address, default 1024; requests wait.
	MaxPerHost int
}

func orDefault[T comparable](v, d T) T {
	var zero T
	if v == zero {
		return d
	}
	return v
}

// NewTransport returns an HTTP/1.1 keep-alive pool. It never reads proxy settings from
// the environment (the sidecar is the proxy) and never decompresses (bytes pass as they
// are). Call CloseIdleConnections when done with it.
func NewTransport(o TransportOptions) *http.Transport {
	return &http.Transport{
		Proxy:                  nil,
		DisableCompression:     true,
		DialContext:            GuardedDial(o.Dial, o.Guard, orDefault(o.DialTimeout, 5*time.Second)),
		TLSHandshakeTimeout:    orDefault(o.TLSTimeout, 10*time.Second),
		ResponseHeaderTimeout:  o.HeadTimeout,
		IdleConnTimeout:        orDefault(o.IdleTimeout, 90*time.Second),
		MaxIdleConns:           orDefault(o.MaxIdle, 2048),
		MaxIdleConnsPerHost:    orDefault(o.MaxIdlePerHost, 256),
		MaxConnsPerHost:        orDefault(o.MaxPerHost, 1024),
		MaxResponseHeaderBytes: 256 << 10,
		// Model requests carry prompts and answers of tens of kB: fewer, larger calls.
		WriteBufferSize: 16 << 10,
		ReadBufferSize:  16 << 10,
	}
}

// GuardedDial returns a dialer that refuses what guard refuses and gives up after
// timeout. With the built-in network (dial nil) the resolved address is checked between
// resolution and connect, so not even a SYN leaves; an injected dialer is checked before
// the call (literal addresses) and after it (the peer it reached).
func GuardedDial(dial DialFunc, guard *Guard, timeout time.Duration) DialFunc {
	if dial == nil {
		return guard.dial(timeout)
	}
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		if err := guard.checkText(address); err != nil {
			return nil, err
		}
		ctx, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		c, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		if err := guard.checkConn(c); err != nil {
			c.Close()
			return nil, err
		}
		return c, nil
	}
}
