// Package status maps the one documented set of errors (outrigger.Kind) to gRPC
// codes, HTTP statuses and process exit codes. It is the only place that does, and
// the tables are exhaustive.
package status

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	gstatus "google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger"
)

type mapping struct {
	grpc codes.Code
	http int
}

var table = map[outrigger.Kind]mapping{
	outrigger.Internal:     {codes.Internal, http.StatusInternalServerError},
	outrigger.Invalid:      {codes.InvalidArgument, http.StatusBadRequest},
	outrigger.NotFound:     {codes.NotFound, http.StatusNotFound},
	outrigger.Exists:       {codes.AlreadyExists, http.StatusConflict},
	outrigger.Conflict:     {codes.Aborted, http.StatusPreconditionFailed},
	outrigger.Locked:       {codes.FailedPrecondition, http.StatusLocked},
	outrigger.Denied:       {codes.PermissionDenied, http.StatusForbidden},
	outrigger.Unauthorised: {codes.Unauthenticated, http.StatusUnauthorized},
	outrigger.Exhausted:    {codes.ResourceExhausted, http.StatusTooManyRequests},
	outrigger.Unavailable:  {codes.Unavailable, http.StatusServiceUnavailable},
	outrigger.Unknown:      {codes.Unknown, http.StatusBadGateway},
	outrigger.Stale:        {codes.OutOfRange, http.StatusServiceUnavailable},
	outrigger.Cancelled:    {codes.Canceled, 499},
	outrigger.Timeout:      {codes.DeadlineExceeded, http.StatusGatewayTimeout},
}

// Code returns the gRPC code of a kind.
func Code(k outrigger.Kind) codes.Code { return table[k].grpc }

// HTTP returns the HTTP status of a kind.
func HTTP(k outrigger.Kind) int { return table[k].http }

// KindOfCode is the inverse of Code.
func KindOfCode(c codes.Code) outrigger.Kind {
	for k, m := range table {
		if m.grpc == c {
			return k
		}
	}
	return outrigger.Internal
}

// currentTrailer carries Error.Current over gRPC.
const currentTrailer = "x-outrigger-current"

// ToGRPC turns any error into a gRPC status error; nil stays nil. A status error that
// came from a peer passes unchanged. The cause of an Internal error is not shown.
func ToGRPC(err error) error {
	if err == nil {
		return nil
	}
	var own *outrigger.Error
	if _, ok := gstatus.FromError(err); ok && !errors.As(err, &own) {
		return err
	}
	k := kindOf(err)
	return gstatus.Error(Code(k), message(k, err))
}

// Trailer returns the metadata that carries what a gRPC status cannot.
func Trailer(err error) metadata.MD {
	var e *outrigger.Error
	if errors.As(err, &e) && e.Kind == outrigger.Conflict {
		return metadata.Pairs(currentTrailer, strconv.Itoa(int(e.Current)))
	}
	return nil
}

// FromGRPC turns a gRPC status error into an outrigger.Error with the same kind and
// message; nil stays nil. trailer may be nil.
func FromGRPC(err error, trailer metadata.MD) error {
	if err == nil {
		return nil
	}
	s, ok := gstatus.FromError(err)
	if !ok {
		return err
	}
	e := &outrigger.Error{Kind: KindOfCode(s.Code()), Message: s.Message()}
	if v := trailer.Get(currentTrailer); len(v) == 1 {
		if n, perr := strconv.ParseInt(v[0], 10, 32); perr == nil {
			e.Current = int32(n)
		}
	}
	return e
}

// WriteHTTP writes err as {"error":{"kind","message","current_version"?}} with its status:
// HTTP's for the kind, and 413 when the cause is a body over its limit, which no later
// attempt makes smaller (RFC 9110, section 15.5.14).
func WriteHTTP(w http.ResponseWriter, err error) {
	err = FromGRPC(err, nil)
	k := kindOf(err)
	body := map[string]any{"kind": k.String(), "message": message(k, err)}
	var e *outrigger.Error
	if errors.As(err, &e) && k == outrigger.Conflict {
		body["current_version"] = e.Current
	}
	w.Header().Set("content-type", "application/json")
	code := HTTP(k)
	if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
		code = http.StatusRequestEntityTooLarge
	}
	w.WriteHeader(code)
	// The status line is out; a failed body write has nobody left to tell.
	_ = json.NewEncoder(w).Encode(map[string]any{"error": body})
}

// Exit codes of the command line, after sysexits.h where it has one.
const (
	ExitOK          = 0
	ExitFailure     = 1
	ExitUsage       = 2
	ExitConfig      = 64
	ExitUnavailable = 69
)

// Exit returns the process exit code for err.
func Exit(err error) int {
	switch {
	case err == nil:
		return ExitOK
	case kindOf(err) == outrigger.Unavailable:
		return ExitUnavailable
	}
	return ExitFailure
}

func kindOf(err error) outrigger.Kind {
	switch {
	case errors.Is(err, context.Canceled):
		return outrigger.Cancelled
	case errors.Is(err, context.DeadlineExceeded):
		return outrigger.Timeout
	}
	return outrigger.KindOf(err)
}

// message is what a remote caller may read.
func message(k outrigger.Kind, err error) string {
	if k == outrigger.Internal {
		return "internal error; see the server's log"
	}
	var e *outrigger.Error
	if errors.As(err, &e) {
		return e.Message
	}
	return err.Error()
}
