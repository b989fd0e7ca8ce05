package outrigger

import (
	"errors"
	"fmt"
)

// Kind classifies an error once; cmd-line exit codes, HTTP statuses and gRPC codes
// derive from it in internal/status and nowhere else.
type Kind uint8

// The documented set of errors.
const (
	Internal     Kind = iota // a bug or broken invariant on our side
	Invalid                  // the request can never succeed as written
	NotFound                 // the named thing does not exist; the text contains "not found"
	Exists                   // creation of something that exists already
	Conflict                 // expected version did not match; retry after reading
	Locked                   // an optimisation lock or a frozen plan forbids the change
	Denied                   // authenticated, but not allowed
	Unauthorised             // not authenticated
	Exhausted                // a stated limit is reached; the text names it
	Unavailable              // a needed peer cannot be reached; nothing was changed
	Unknown                  // outcome unknown: the change may or may not have been made
	Stale                    // the asked freshness cannot be met right now
	Cancelled                // the caller went away
	Timeout                  // a deadline passed before an answer
)

var kindNames = [...]string{"internal", "invalid", "not_found", "exists", "conflict", "locked", "denied",
	"unauthorised", "exhausted", "unavailable", "unknown_outcome", "stale", "cancelled", "timeout"}

// String returns the stable snake_case word used in JSON errors and metrics.
func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return fmt.Sprintf("kind(%d)", k)
}

// Kinds lists every kind, for exhaustive tables and their tests.
func Kinds() []Kind {
	out := make([]Kind, len(kindNames))
	for i := range out {
		out[i] = Kind(i)
	}
	return out
}

// Error is the error type that crosses package and process boundaries. Message
// names the field, the value, the limit and the remedy where there is one.
type Error struct {
	Kind    Kind
	Message string
	Cause   error // may be nil; never shown to remote callers
	// Current is the variable's present counter, set with Conflict.
	Current int32
}

// Error returns the message followed by the cause.
func (e *Error) Error() string {
	if e.Cause != nil {
		return e.Message + ": " + e.Cause.Error()
	}
	return e.Message
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Cause }

// Errorf builds an Error whose message is formatted as by fmt.Sprintf. Use Wrap to
// keep a cause.
func Errorf(kind Kind, format string, args ...any) *Error {
	return &Error{Kind: kind, Message: fmt.Sprintf(format, args...)}
}

// Wrap gives err a kind and a prefix. It returns nil for a nil err.
func Wrap(kind Kind, err error, prefix string) error {
	if err == nil {
		return nil
	}
	return &Error{Kind: kind, Message: prefix, Cause: err}
}

// KindOf returns the kind of the first Error in err's chain, or Internal.
func KindOf(err error) Kind {
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	return Internal
}

// IsKind reports whether err is an Error of the given kind.
func IsKind(err error, kind Kind) bool {
	var e *Error
	return errors.As(err, &e) && e.Kind == kind
}

// ErrSessionNotFound builds the error bridge clients recognise by its text.
func ErrSessionNotFound(id string) *Error { return Errorf(NotFound, "Session not found: %s", id) }

// ErrVariableNotFound builds the error bridge clients recognise by its text.
func ErrVariableNotFound(name string) *Error { return Errorf(NotFound, "Variable not found: %s", name) }

// ErrVersionMismatch builds the error of a failed compare-and-set.
func ErrVersionMismatch(current int32) *Error {
	e := Errorf(Conflict, "version_mismatch: current=%d", current)
	e.Current = current
	return e
}
