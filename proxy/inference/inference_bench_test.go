package inference

import (
	"bytes"
	"io"
	"net/http"
	"testing"

	"github.com/outrigger-mesh/outrigger/proxy/inference/shape"
	"github.com/outrigger-mesh/outrigger/proxy/upstream"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// BenchmarkProxy sends one small chat request over loopback: app → sidecar → model, all
// in this process, beside the same request without the sidecar.
func BenchmarkProxy(b *testing.B) {
	answer := []byte(answerOf("gpt-v1", "one two three"))
	backend := serve(b, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "application/json")
		w.Write(answer)
	}))
	m := newMesh(b, newPolicy(0, []policy.Endpoint{at(backend, "eu")}, nil), Options{})
	body := []byte(chatBody("user-1", false))
	for name, url := range map[string]string{"direct": "http://" + backend + chatPath, "proxied": m.front.URL + chatPath} {
		for _, par := range []bool{false, true} {
			tr := upstream.NewTransport(upstream.TransportOptions{})
			one := func() {
				req, _ := http.NewRequest("POST", url, bytes.NewReader(body))
				resp, err := tr.RoundTrip(req)
				if err != nil || resp.StatusCode != 200 {
					b.Error(resp, err)
					return
				}
				io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			}
			if par {
				b.Run(name+"/parallel", func(b *testing.B) {
					b.SetParallelism(8)
					b.ReportAllocs()
					b.RunParallel(func(pb *testing.PB) {
						for pb.Next() {
							one()
						}
					})
				})
			} else {
				b.Run(name+"/c1", func(b *testing.B) {
					b.ReportAllocs()
					for b.Loop() {
						one()
					}
				})
			}
			tr.CloseIdleConnections()
		}
	}
}

func BenchmarkAssign(b *testing.B) {
	p := newPolicy(1000, nil, nil)
	h := http.Header{"X-User-Id": {"user-12345@example.org"}}
	e := &shape.Envelope{}
	b.ReportAllocs()
	for b.Loop() {
		m := p.Model("gpt")
		if _, err := Assign(m, unitOf(m.Unit, headerFields(h), e), PolicyStatus{Live: true}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkScan(b *testing.B) {
	body := []byte(`{"model":"gpt","messages":[{"role":"user","content":"` + string(bytes.Repeat([]byte("word "), 2000)) + `"}],"stream":true}`)
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := shape.Scan(body); err != nil {
			b.Fatal(err)
		}
	}
}
