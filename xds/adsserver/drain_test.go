package adsserver_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// A server that stops sends its clients away one after the other; those that are still there
// are served, and nobody new is.
func TestDrain(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.publish(chat(1, "v1"))
		const clients = 10
		gone := func(c *deltaClient) bool {
			synctest.Wait()
			return len(c.ended) > 0
		}
		var all []*deltaClient
		for i := range clients {
			c := w.delta(w.conn, fmt.Sprintf("n%d", i))
			c.follow()
			c.read()
			c.ackAll()
			all = append(all, c)
		}
		drained := make(chan error, 1)
		go func() { drained <- w.srv.Drain(context.Background(), time.Second) }()
		for second := range clients {
			synctest.Wait()
			n := 0
			for _, c := range all {
				if gone(c) {
					n++
				}
			}
			if n != second+1 {
				t.Fatalf("%d clients have been sent away after %d s, want one a second", n, second)
			}
			if second == 5 {
				late := w.delta(w.conn, "late")
				if err := <-late.ended; gstatus.Code(err) != codes.Unavailable {
					t.Fatalf("a new stream ended with %v, want Unavailable", err)
				}
				w.publish(chat(2, "v1", "v2"))
				for _, c := range all {
					if got := c.read(); (len(got) > 0) == gone(c) {
						t.Fatalf("a client that is gone (%v) was sent %q", gone(c), got)
					}
				}
			}
			time.Sleep(time.Second)
		}
		if err := <-drained; err != nil {
			t.Fatal(err)
		}
		for _, c := range all {
			if err := <-c.ended; gstatus.Code(err) != codes.Unavailable {
				t.Errorf("a stream ended with %v, want Unavailable", err)
			}
		}
		if err := w.srv.Drain(context.Background(), time.Hour); err != nil {
			t.Errorf("nobody is left, and yet: %v", err)
		}
	})
}

// Drain has no longer than its context: a deadline makes the pauses shorter, and when it is
// cancelled everybody goes at once.
func TestDrainInTime(t *testing.T) {
	for name, c := range map[string]struct {
		limit, cancel, want time.Duration
	}{
		"deadline":  {limit: time.Second, want: 600 * time.Millisecond},
		"cancelled": {limit: 100 * time.Hour, cancel: time.Second, want: time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, adsserver.Options{}, func(w *world) {
				w.publish(chat(1, "v1"))
				var all []*deltaClient
				for i := range 3 {
					c := w.delta(w.conn, fmt.Sprintf("n%d", i))
					c.follow()
					all = append(all, c)
				}
				ctx, cancel := context.WithTimeout(context.Background(), c.limit)
				defer cancel()
				if c.cancel > 0 {
					defer time.AfterFunc(c.cancel, cancel).Stop()
				}
				began := time.Now()
				_ = w.srv.Drain(ctx, time.Hour) // cancelled, it may or may not see the end of the last
				if took := time.Since(began); took != c.want {
					t.Errorf("it took %v, want %v", took, c.want)
				}
				for _, c := range all {
					<-c.ended
				}
			})
		})
	}
}

// streamsEnded is what the log of a server says about each stream, by node.
func streamsEnded(t *testing.T, log string) map[string]map[string]any {
	t.Helper()
	out := map[string]map[string]any{}
	for line := range strings.Lines(log) {
		var x map[string]any
		if err := json.Unmarshal([]byte(line), &x); err != nil {
			t.Fatal(err)
		}
		if x["msg"] == "stream ended" {
			out[x["node"].(string)] = x
		}
	}
	return out
}

// What a reconnect cost is known: nothing for a delta client that says what it has, one
// response of a type for a state-of-the-world client; and what was asked anew counts.
func TestTraffic(t *testing.T) {
	var log bytes.Buffer
	bubble(t, adsserver.Options{Logger: slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))}, func(w *world) {
		w.publish(chat(1, "v1"))
		fresh := w.delta(w.conn, "fresh")
		fresh.follow()
		fresh.read()
		fresh.ackAll()
		for _, again := range []string{"back", "curious"} {
			c := w.delta(w.conn, again)
			for _, typeURL := range xds.Types() {
				held := map[string]string{}
				for k, v := range fresh.vers {
					if of, name, _ := strings.Cut(k, " "); of == typeURL {
						held[name] = v
					}
				}
				c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: []string{xds.Wildcard}, InitialResourceVersions: held})
			}
			c.read()
			c.ackAll()
			c.subscribe(xds.TypeMeshPolicy, xds.MeshName) // a probe
			if again == "curious" {
				c.subscribe(xds.TypeCluster, "model/chat/v1")
			}
			c.read()
			c.hangUp()
		}
		if err := w.srv.Publish(adsserver.KindGroup(translate.KindGRPC), resources(t, chat(1, "v1")), 1); err != nil {
			t.Fatal(err)
		}
		listeners := ""
		for _, id := range []string{"grpc", "grpc-back"} {
			c := w.sotw(id)
			c.node.UserAgentName = "gRPC Go"
			if id != "grpc" {
				c.version[lds] = listeners
			}
			c.request(lds, nil, "model/chat")
			c.want(expect(lds, "model/chat"))
			c.request(lds, nil, "model/chat")
			listeners = c.version[lds]
			c.want()
			c.hangUp()
		}
		synctest.Wait()
		got := streamsEnded(t, log.String())
		for node, want := range map[string]map[string]any{
			"back":      {"resumed": true, "resent": 0.0, "resources": 0.0, "refreshed": 0.0},
			"curious":   {"resumed": true, "resent": 1.0, "resources": 1.0, "refreshed": 0.0},
			"grpc":      {"resumed": false, "resent": 0.0, "resources": 1.0, "refreshed": 0.0, "delta": false},
			"grpc-back": {"resumed": true, "resent": 0.0, "resources": 1.0, "refreshed": 1.0, "responses": 1.0},
		} {
			for field, value := range want {
				if got[node][field] != value {
					t.Errorf("%s: %s is %v, want %v", node, field, got[node][field], value)
				}
			}
		}
	})
}
