package inference

import (
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// inGatedNode is two pods whose models answer as the test lets them.
func inGatedNode(t *testing.T, ctype string, do func(t *testing.T, w *nodeWorld)) {
	t.Helper()
	inNodeWorldOf(t, func(p *podWorld) http.RoundTripper {
		p.gate = &gated{ctype: ctype}
		return p.gate
	}, do)
}

func (w *nodeWorld) asked(a, b int) {
	w.t.Helper()
	if w.a.gate.asked != a || w.b.gate.asked != b {
		w.t.Errorf("the models were asked %d and %d times; want %d and %d", w.a.gate.asked, w.b.gate.asked, a, b)
	}
}

var (
	eventA = chunkOf("m", `{"content":"a"}`)
	eventB = chunkOf("m", `{"content":"b"}`)
)

// Two pods that ask the same at the same time: one asks the model, the other reads its
// stream along event for event, with its own clients; the answer goes on when the client who asked
// first leaves, and both pods keep it.
func TestPodsReadAlong(t *testing.T) {
	stable, _ := users()
	user := []string{"x-user-id", stable}
	inGatedNode(t, "", func(t *testing.T, w *nodeWorld) {
		one, leave, over1 := askLive(t, w.a.h, user...)
		two, _, over2 := askLive(t, w.b.h, user...)
		three, _, over3 := askLive(t, w.b.h, user...) // the process's reader of the node's flight
		w.asked(1, 0)
		say := func(s string) {
			t.Helper()
			if _, err := io.WriteString(w.a.gate.pipe, s); err != nil {
				t.Fatalf("the model was cut off: %v", err)
			}
		}
		say(eventA)
		if e1, e2, e3 := one.event(t), two.event(t), three.event(t); e1 != eventA || e2 != eventA || e3 != eventA {
			t.Fatalf("first events %q, %q and %q", e1, e2, e3)
		}
		h := two.Header()
		if h.Get("x-outrigger-cache") != "joined" || h.Get("x-outrigger-tier") != "node" || h.Get("Content-Type") != "text/event-stream" || h.Get("x-outrigger-version") != "v1" {
			t.Errorf("the other pod's client is told %v", h)
		}
		leave()
		synctest.Wait()
		say(eventB)
		if e2, e3 := two.event(t), three.event(t); e2 != eventB || e3 != eventB {
			t.Fatalf("after the client who asked had left: %q and %q", e2, e3)
		}
		say(streamDone)
		w.a.gate.pipe.Close()
		if e2, e3 := two.event(t), three.event(t); e2 != streamDone || e3 != streamDone {
			t.Fatalf("last events %q and %q", e2, e3)
		}
		<-over1
		<-over2
		<-over3
		synctest.Wait()
		body := strings.Replace(zero, "{", `{"stream":true,`, 1)
		for name, p := range map[string]*podWorld{"the pod that asked": w.a, "the pod that read along": w.b} {
			r := post(p.h, chatPath, body, user...)
			if r.Body.String() != eventA+eventB+streamDone || r.Header().Get("x-outrigger-tier") != "process" {
				t.Errorf("%s: %q with %v", name, r.Body, r.Header())
			}
		}
		w.asked(1, 0)
		if a, b := only(t, w.a.h), w.b.h.LocalStats().NodeAnswers; a.Requests != 1 || a.Cancelled+a.Failures != 0 || b.Joined != 1 {
			t.Errorf("recorded %v; counted %+v", a, b)
		}
	})
}

// JSON is passed on whole; what the pod that asks loses before that, others ask for themselves.
func TestPodsReadJSONAlong(t *testing.T) {
	stable, _ := users()
	user := []string{"x-user-id", stable}
	inGatedNode(t, "application/json", func(t *testing.T, w *nodeWorld) {
		type answer struct{ body, from, length string }
		got := make(chan answer, 2)
		ask := func(p *podWorld) {
			go func() {
				r := post(p.h, chatPath, zero, user...)
				got <- answer{r.Body.String(), r.Header().Get("x-outrigger-cache") + r.Header().Get("x-outrigger-tier"), r.Header().Get("Content-Length")}
			}()
			synctest.Wait()
		}
		ask(w.a)
		ask(w.b)
		io.WriteString(w.a.gate.pipe, `{"v":`)
		synctest.Wait()
		io.WriteString(w.a.gate.pipe, `1}`)
		w.a.gate.pipe.Close()
		one, two := <-got, <-got
		if one.from != "miss" {
			one, two = two, one
		}
		if one.body != `{"v":1}` || two != (answer{`{"v":1}`, "joinednode", "7"}) {
			t.Errorf("answered %v and %v", one, two)
		}
		w.asked(1, 0)
	})
	for name, lose := range map[string]func(w *nodeWorld){
		"the model is lost": func(w *nodeWorld) { w.a.gate.pipe.CloseWithError(errCut) },
		"the agent is lost": func(w *nodeWorld) { w.server.Stop() },
	} {
		inGatedNode(t, "application/json", func(t *testing.T, w *nodeWorld) {
			for _, p := range []*podWorld{w.a, w.b} {
				p.src.p.Load().Models[0].MaxAttempts = 1
			}
			got := make(chan string, 2)
			go func() { post(w.a.h, chatPath, zero, user...); got <- "a" }()
			synctest.Wait()
			go func() { got <- post(w.b.h, chatPath, zero, user...).Body.String() }()
			synctest.Wait()
			w.asked(1, 0)
			io.WriteString(w.a.gate.pipe, `{"v":`)
			synctest.Wait()
			lose(w)
			synctest.Wait()
			w.asked(1, 1)
			io.WriteString(w.b.gate.pipe, `{"v":2}`)
			w.b.gate.pipe.Close()
			w.a.gate.pipe.Close()
			one, two := <-got, <-got
			if one != `{"v":2}` && two != `{"v":2}` {
				t.Errorf("%s: answered %q and %q", name, one, two)
			}
		})
	}
}

// A stream that is lost on its way ends for who read it along as for who asked; so it
// does with the agent, while who asked reads on.
func TestPodLosesStream(t *testing.T) {
	stable, _ := users()
	user := []string{"x-user-id", stable}
	for name, agent := range map[string]bool{"model": false, "agent": true} {
		inGatedNode(t, "", func(t *testing.T, w *nodeWorld) {
			w.a.src.p.Load().Models[0].MaxAttempts = 1
			one, _, over1 := askLive(t, w.a.h, user...)
			two, _, over2 := askLive(t, w.b.h, user...)
			io.WriteString(w.a.gate.pipe, eventA)
			if e1, e2 := one.event(t), two.event(t); e1 != eventA || e2 != eventA {
				t.Fatalf("first events %q and %q", e1, e2)
			}
			if agent {
				go w.server.Stop()
			} else {
				w.a.gate.pipe.CloseWithError(errCut)
			}
			if e := two.event(t); !strings.Contains(e, `"upstream_lost"`) {
				t.Errorf("%s lost: who read along got %q", name, e)
			}
			<-over2
			if agent {
				io.WriteString(w.a.gate.pipe, eventB)
				if e := one.event(t); e != eventB {
					t.Errorf("who asked got %q without the agent", e)
				}
				w.a.gate.pipe.Close()
			}
			for one.event(t) != "" {
			}
			<-over1
			w.asked(1, 0)
		})
	}
}

// When nobody is left, in no pod, the model's work is cut short.
func TestNobodyLeftOnNode(t *testing.T) {
	stable, _ := users()
	user := []string{"x-user-id", stable}
	inGatedNode(t, "", func(t *testing.T, w *nodeWorld) {
		_, leave1, over1 := askLive(t, w.a.h, user...)
		_, leave2, over2 := askLive(t, w.b.h, user...)
		leave1()
		synctest.Wait()
		if w.a.gate.ctx.Err() != nil {
			t.Error("the model was cut off while the other pod waited")
		}
		leave2()
		<-over1
		<-over2
		if w.a.gate.ctx.Err() == nil {
			t.Error("the model works for nobody")
		}
		w.asked(1, 0)
	})
}

// Who waits for another pod waits as long as its request may take.
func TestPatienceWithOtherPod(t *testing.T) {
	stable, _ := users()
	inGatedNode(t, "", func(t *testing.T, w *nodeWorld) {
		_, leave, over := askLive(t, w.a.h, "x-user-id", stable)
		begun := time.Now()
		r := post(w.b.h, chatPath, strings.Replace(zero, "{", `{"stream":true,`, 1), "x-user-id", stable, "x-request-timeout", "2.5")
		if took := time.Since(begun); r.Code != http.StatusGatewayTimeout || took != 2500*time.Millisecond {
			t.Errorf("status %d after %v", r.Code, took)
		}
		leave()
		<-over
	})
}

// An agent of an earlier version shares answers, one by one; it is asked for flights again
// after a minute.
func TestAgentWithoutFlights(t *testing.T) {
	stable, _ := users()
	user := []string{"x-user-id", stable}
	inNodeWorld(t, []step{{status: 200, body: `{"v":1}`}}, func(t *testing.T, w *nodeWorld) {
		w.server.Stop()
		w.old = true
		w.start()
		time.Sleep(10 * time.Second)
		if _, how := w.ask(w.a, other, user...); how != "miss" {
			t.Errorf("from a new agent: %s", how)
		}
		if _, how := w.ask(w.b, other, user...); how != "hit node" {
			t.Errorf("an old agent's answer: %s", how)
		}
		w.server.Stop()
		w.old = false
		w.start()
		time.Sleep(2 * time.Minute)
		w.ask(w.a, other, user...)
		if _, how := w.ask(w.b, other, user...); how != "hit node" && how != "hit process" {
			t.Errorf("with a present agent again: %s", how)
		}
	})
}

// A pod that is about to end leads nobody: what it begins then, it asks alone.
func TestEndingPodLeadsNobody(t *testing.T) {
	stable, _ := users()
	user := []string{"x-user-id", stable}
	inGatedNode(t, "", func(t *testing.T, w *nodeWorld) {
		w.stop()
		synctest.Wait()
		_, leave1, over1 := askLive(t, w.a.h, user...)
		_, leave2, over2 := askLive(t, w.b.h, user...)
		w.asked(1, 1)
		leave1()
		leave2()
		<-over1
		<-over2
	})
}
