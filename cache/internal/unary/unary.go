// Package unary makes gRPC calls whose failure says whether the request can have
// reached the server.
//
// A caller that may try a write elsewhere has to know. gRPC reports "not connected" and
// "the connection broke while waiting for the answer" with one code, UNAVAILABLE; only
// the first allows a second try. Conn makes each unary call as a stream of one message
// each way, so that the two are two steps: when the stream cannot be opened, no request
// message left this process, and the error is an Unsent.
package unary

import (
	"context"
	"errors"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	gstatus "google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// Unsent is a gRPC status error of a call whose request certainly was not sent.
type Unsent struct{ Err error }

// Error returns the status text.
func (u *Unsent) Error() string { return u.Err.Error() }

// Unwrap returns the status error.
func (u *Unsent) Unwrap() error { return u.Err }

// GRPCStatus makes status.FromError see the peer's status, not a generic one.
func (u *Unsent) GRPCStatus() *gstatus.Status { return gstatus.Convert(u.Err) }

// Conn wraps a connection. Streams pass unchanged; unary calls fail with *Unsent when
// the request was not sent. It may be used concurrently.
func Conn(cc grpc.ClientConnInterface) grpc.ClientConnInterface { return conn{cc} }

type conn struct{ grpc.ClientConnInterface }

func (c conn) Invoke(ctx context.Context, method string, req, resp any, opts ...grpc.CallOption) error {
	// The stream's goroutines live until it has ended or its context has.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := c.NewStream(ctx, &grpc.StreamDesc{}, method, opts...)
	if err != nil {
		return &Unsent{err}
	}
	// After SendMsg fails, RecvMsg has the status.
	if s.SendMsg(req) == nil {
		_ = s.CloseSend()
	}
	return s.RecvMsg(resp) // with the status, because the stream is declared to have one answer
}

// outcomeTrailer tells the next hop that a failed write certainly did nothing.
const outcomeTrailer = "x-outrigger-outcome"

// NothingDone is the trailer for a write that failed before it was sent anywhere.
func NothingDone() metadata.MD { return metadata.Pairs(outcomeTrailer, "none") }

// Outcome is what a failed write may have done.
type Outcome uint8

// The outcomes.
const (
	Done    Outcome = iota // it succeeded
	Refused                // the authority said no; nothing was changed
	Nothing                // it never reached the authority; nothing was changed
	Unsure                 // it may have been made
)

// Judge classifies the end of a write. trailer is what came with the answer, if any.
// Codes that gRPC itself or a proxy on the way may have made up count as Unsure.
func Judge(err error, trailer metadata.MD) Outcome {
	if err == nil {
		return Done
	}
	var unsent *Unsent
	if errors.As(err, &unsent) || len(trailer.Get(outcomeTrailer)) > 0 {
		return Nothing
	}
	switch status.KindOfCode(gstatus.Code(err)) {
	case outrigger.Invalid, outrigger.NotFound, outrigger.Exists, outrigger.Conflict, outrigger.Locked,
		outrigger.Denied, outrigger.Unauthorised:
		return Refused
	}
	return Unsure
}

// Answered reports whether a status came from a server rather than from this process's
// transport: a server's answer carries at least its content type in the trailer.
func Answered(trailer metadata.MD) bool { return len(trailer) > 0 }

// Clarify gives the error of a write that broke on the way the kind Unknown, because
// gRPC's UNAVAILABLE would say that nothing was changed, and says so where nothing was.
// Other errors pass unchanged. The result is a gRPC status error.
func Clarify(err error, trailer metadata.MD) error {
	var unsent *Unsent
	switch {
	case errors.As(err, &unsent):
		return status.ToGRPC(outrigger.Wrap(outrigger.Unavailable, err, "the control plane cannot be reached; nothing was changed"))
	case gstatus.Code(err) == codes.Unavailable && !Answered(trailer):
		return status.ToGRPC(outrigger.Wrap(outrigger.Unknown, err,
			"the connection to the control plane broke while it was writing; read the variable, or repeat the call with the same request_id"))
	}
	return err
}
