package shelf_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"testing"

	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/shelf"
)

type tenantKey struct{}

// world is a store of two tenants with a clock set by hand.
type world struct {
	t   *testing.T
	s   *shelf.Store
	now int64
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, now: 1e9}
	var err error
	w.s, err = shelf.New(shelf.Options{Bytes: 16 << 20, Tenants: []string{"acme", "umbra"}, Clock: func() int64 { return w.now },
		Tenant: func(ctx context.Context) (string, error) {
			if name, ok := ctx.Value(tenantKey{}).(string); ok {
				return name, nil
			}
			return "", outrigger.Errorf(outrigger.Denied, "nobody")
		}})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func as(t *testing.T, tenant string) context.Context {
	return context.WithValue(t.Context(), tenantKey{}, tenant)
}

func id(n int) []byte {
	return binary.BigEndian.AppendUint64(make([]byte, shelf.KeyBytes-8), uint64(n))
}

func (w *world) put(tenant string, key, stretch int, body string, age, ttl int64) bool {
	w.t.Helper()
	r, err := w.s.PutAnswer(as(w.t, tenant), &pb.PutAnswerRequest{Key: id(key), Stretch: id(stretch),
		Answer: &pb.NodeAnswer{Header: []*pb.AnswerField{{Name: "Content-Type", Value: "application/json"}}, Body: []byte(body), AgeMs: age, TtlMs: ttl}})
	if err != nil {
		w.t.Fatal(err)
	}
	return r.Kept
}

func (w *world) get(tenant string, key, stretch int) *pb.NodeAnswer {
	w.t.Helper()
	r, err := w.s.GetAnswer(as(w.t, tenant), &pb.GetAnswerRequest{Key: id(key), Stretch: id(stretch)})
	if err != nil {
		w.t.Fatal(err)
	}
	return r.Answer
}

func (w *world) end(tenant string, stretches ...int) {
	w.t.Helper()
	r := &pb.EndStretchRequest{}
	for _, n := range stretches {
		r.Stretches = append(r.Stretches, id(n))
	}
	if _, err := w.s.EndStretch(as(w.t, tenant), r); err != nil {
		w.t.Fatal(err)
	}
}

func TestFoundByItsTenantInItsTime(t *testing.T) {
	w := newWorld(t)
	if !w.put("acme", 1, 7, "hello", 500, 2000) {
		t.Fatal("not kept")
	}
	w.now += 1500e6
	a := w.get("acme", 1, 7)
	if a == nil || string(a.Body) != "hello" || a.AgeMs != 2000 || a.TtlMs != 500 || len(a.Header) != 1 || a.Header[0].GetValue() != "application/json" {
		t.Errorf("found %v", a)
	}
	for name, a := range map[string]*pb.NodeAnswer{"another tenant": w.get("umbra", 1, 7), "another key": w.get("acme", 2, 7), "another stretch": w.get("acme", 1, 8)} {
		if a != nil {
			t.Errorf("%s finds %v", name, a)
		}
	}
	w.now += 500e6
	if a := w.get("acme", 1, 7); a != nil {
		t.Errorf("found after its time: %v", a)
	}
}

// What ended is not found, and nothing of it is taken from those who have not heard.
func TestEndedStretch(t *testing.T) {
	w := newWorld(t)
	w.put("acme", 1, 7, "a", 0, 10_000)
	w.put("acme", 2, 8, "b", 0, 10_000)
	w.put("umbra", 1, 7, "c", 0, 10_000)
	w.end("acme", 7)
	if w.get("acme", 1, 7) != nil || w.put("acme", 3, 7, "late", 0, 10_000) || w.get("acme", 3, 7) != nil {
		t.Error("something of the ended stretch is found or taken")
	}
	if w.get("acme", 2, 8) == nil || w.get("umbra", 1, 7) == nil {
		t.Error("another stretch, or another tenant's, ended too")
	}
	// More ends than are remembered: what was kept goes, and the newest are remembered.
	for n := range shelf.MaxEnded {
		w.end("acme", 100+n)
	}
	if w.get("acme", 2, 8) != nil {
		t.Error("answers outlived the memory of what has ended")
	}
	if w.put("acme", 1, 100+shelf.MaxEnded-1, "late", 0, 10_000) {
		t.Error("the newest end was forgotten")
	}
	if !w.put("acme", 4, 9, "d", 0, 10_000) || w.get("acme", 4, 9) == nil {
		t.Error("nothing is kept any more")
	}
}

func TestBounds(t *testing.T) {
	w := newWorld(t)
	if w.put("acme", 1, 7, string(make([]byte, shelf.MaxAnswer+1)), 0, 10_000) {
		t.Error("an answer above the limit was kept")
	}
	w.put("umbra", 1, 7, "theirs", 0, 10_000)
	kept := 0
	for n := range 200 { // of 512 KiB, for a part of 8 MiB
		w.put("acme", n, 7, string(bytes.Repeat([]byte("x"), 512<<10)), 0, 10_000)
	}
	for n := range 200 {
		if w.get("acme", n, 7) != nil {
			kept++
		}
	}
	if kept == 0 || kept > 16 {
		t.Errorf("%d answers of 512 KiB are kept in 8 MiB", kept)
	}
	if w.get("umbra", 1, 7) == nil {
		t.Error("one tenant's answers pushed out another's")
	}
}

func TestRefusals(t *testing.T) {
	w := newWorld(t)
	good := &pb.NodeAnswer{TtlMs: 1}
	for name, c := range map[string]struct {
		ctx  context.Context
		r    *pb.PutAnswerRequest
		code codes.Code
	}{
		"nobody":          {t.Context(), &pb.PutAnswerRequest{Key: id(1), Stretch: id(1), Answer: good}, codes.PermissionDenied},
		"unknown tenant":  {as(t, "other"), &pb.PutAnswerRequest{Key: id(1), Stretch: id(1), Answer: good}, codes.PermissionDenied},
		"short key":       {as(t, "acme"), &pb.PutAnswerRequest{Key: []byte("k"), Stretch: id(1), Answer: good}, codes.InvalidArgument},
		"long stretch":    {as(t, "acme"), &pb.PutAnswerRequest{Key: id(1), Stretch: make([]byte, 33), Answer: good}, codes.InvalidArgument},
		"no answer":       {as(t, "acme"), &pb.PutAnswerRequest{Key: id(1), Stretch: id(1)}, codes.InvalidArgument},
		"from the future": {as(t, "acme"), &pb.PutAnswerRequest{Key: id(1), Stretch: id(1), Answer: &pb.NodeAnswer{TtlMs: 1, AgeMs: -1}}, codes.InvalidArgument},
		"for ever":        {as(t, "acme"), &pb.PutAnswerRequest{Key: id(1), Stretch: id(1), Answer: &pb.NodeAnswer{TtlMs: 1 << 60}}, codes.InvalidArgument},
	} {
		if _, err := w.s.PutAnswer(c.ctx, c.r); gstatus.Code(err) != c.code {
			t.Errorf("%s: %v, want %v", name, err, c.code)
		}
	}
	if _, err := w.s.EndStretch(as(t, "acme"), &pb.EndStretchRequest{Stretches: make([][]byte, shelf.MaxAtOnce+1)}); gstatus.Code(err) != codes.InvalidArgument {
		t.Errorf("too many stretches: %v", err)
	}
	if _, err := shelf.New(shelf.Options{Bytes: shelf.MinBytes, Tenants: []string{"a", "b"}, Clock: func() int64 { return 1 }}); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("less than each tenant needs: %v", err)
	}
}
