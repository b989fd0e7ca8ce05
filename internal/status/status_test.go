package status

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger"
)

// Every kind has its own gRPC code and survives the trip there and back; every kind
// has an HTTP error status.
func TestTableIsExhaustiveAndInvertible(t *testing.T) {
	for _, k := range outrigger.Kinds() {
		if _, ok := table[k]; !ok {
			t.Errorf("kind %s is not mapped", k)
			continue
		}
		if got := KindOfCode(Code(k)); got != k {
			t.Errorf("%s → %s → %s", k, Code(k), got)
		}
		if HTTP(k) < 400 {
			t.Errorf("%s maps to HTTP %d", k, HTTP(k))
		}
	}
}

// A version mismatch keeps its message, kind and current counter over gRPC.
func TestRoundTripKeepsCurrent(t *testing.T) {
	in := outrigger.ErrVersionMismatch(7)
	out := FromGRPC(ToGRPC(in), Trailer(in))
	var e *outrigger.Error
	if !errors.As(out, &e) || e.Kind != outrigger.Conflict || e.Current != 7 || !strings.Contains(e.Message, "version_mismatch: current=7") {
		t.Fatalf("got %#v", out)
	}
}

// Internal causes are never shown to a remote caller; contexts map to their own kinds;
// a peer's status passes unchanged unless we gave it a kind of our own.
func TestToGRPC(t *testing.T) {
	secret := errors.New("password=hunter2")
	if s := gstatus.Convert(ToGRPC(outrigger.Wrap(outrigger.Internal, secret, "open"))); strings.Contains(s.Message(), "hunter2") {
		t.Errorf("cause leaked: %s", s.Message())
	}
	if c := gstatus.Code(ToGRPC(context.DeadlineExceeded)); c != codes.DeadlineExceeded {
		t.Errorf("deadline: %s", c)
	}
	peer := gstatus.Error(codes.FailedPrecondition, "theirs")
	if got := ToGRPC(peer); got != peer {
		t.Errorf("peer status changed: %v", got)
	}
	if c := gstatus.Code(ToGRPC(outrigger.Wrap(outrigger.Unavailable, peer, "origin"))); c != codes.Unavailable {
		t.Errorf("own kind lost: %s", c)
	}
	if ToGRPC(nil) != nil || FromGRPC(nil, nil) != nil {
		t.Error("nil is not nil")
	}
}

// The HTTP body names kind, message and the current version of a conflict.
func TestWriteHTTP(t *testing.T) {
	rec := httptest.NewRecorder()
	WriteHTTP(rec, outrigger.ErrVersionMismatch(3))
	if rec.Code != 412 || !strings.Contains(rec.Body.String(), `"current_version":3`) || !strings.Contains(rec.Body.String(), `"kind":"conflict"`) {
		t.Fatalf("%d %s", rec.Code, rec.Body)
	}
}

// Exit codes distinguish success, an unreachable peer and other failures.
func TestExit(t *testing.T) {
	if Exit(nil) != 0 || Exit(errors.New("x")) != 1 || Exit(outrigger.Errorf(outrigger.Unavailable, "x")) != 69 {
		t.Fatal("exit codes changed")
	}
}

// The table readers look things up in says what the program does, for every kind.
func TestArchitectureListsEveryKind(t *testing.T) {
	text, err := os.ReadFile("../../ARCHITECTURE.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(text), "\n## Errors\n")
	if !found {
		t.Fatal(`ARCHITECTURE.md has no section "Errors"`)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	if rows := strings.Count(section, "\n| ") - 1; rows != len(outrigger.Kinds()) {
		t.Errorf("%d rows for %d kinds", rows, len(outrigger.Kinds()))
	}
	for _, k := range outrigger.Kinds() {
		var c codes.Code
		row := fmt.Sprintf("\n| %s | ", k)
		_, after, found := strings.Cut(section, row)
		word, rest, _ := strings.Cut(after, " | ")
		if !found || c.UnmarshalJSON([]byte(strconv.Quote(word))) != nil || c != Code(k) || !strings.HasPrefix(rest, strconv.Itoa(HTTP(k))+" | ") {
			t.Errorf("no row says that %s is %s and %d; it reads %q", k, Code(k), HTTP(k), row+strings.SplitN(after, "\n", 2)[0])
		}
	}
}

// TestMLflowCodes: every kind has a word of MLflow's, and one that its clients do not
// repeat unless that may help.
func TestMLflowCodes(t *testing.T) {
	for k := range table {
		w := httptest.NewRecorder()
		WriteMLflow(w, outrigger.Errorf(k, "why"))
		var body struct {
			Code    string `json:"error_code"`
			Message string `json:"message"`
		}
		if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil || body.Code == "" || w.Code < 400 {
			t.Errorf("%v: %d %s, %v", k, w.Code, w.Body, err)
		}
		if text := body.Message; (text == "why") == (k == outrigger.Internal) {
			t.Errorf("%v says %q", k, text)
		}
	}
	w := httptest.NewRecorder()
	if WriteMLflow(w, &outrigger.Error{Kind: outrigger.Invalid, Message: "never", Cause: ErrNotImplemented}); w.Code != http.StatusNotImplemented {
		t.Errorf("not implemented is %d", w.Code)
	}
}
