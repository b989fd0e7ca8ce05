package control_test

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/deploy"
)

// browserWait bounds every wait for something to appear on a page, on a loaded machine.
const browserWait = 60 * time.Second

// browser is one tab of a headless Chromium, driven by its DevTools protocol
// (https://chromedevtools.github.io/devtools-protocol/). One goroutine reads what it says;
// a test calls its methods from its own goroutine.
type browser struct {
	t       testing.TB
	conn    *websocket.Conn
	ctx     context.Context
	session string
	next    int

	mu      sync.Mutex
	answers map[int]chan answer
	faults  []string // console errors, exceptions, failed loads
}

// answer is what the browser says to one command: a result or why there is none.
type answer struct{ result, refusal json.RawMessage }

// newBrowser starts a Chromium with an empty profile, which ends with the test. Without one
// the test is skipped, and fails where CI is set.
func newBrowser(t testing.TB) *browser {
	t.Helper()
	path, err := exec.LookPath("chromium")
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("chromium is missing; the pages cannot be tested")
		}
		t.Skip("chromium is not installed (make deps); the pages are not tested in a browser")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	profile, err := os.MkdirTemp("", "outrigger-browser")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { discard(t, profile) })
	cmd := exec.Command(path, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
		"--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--user-data-dir="+profile, "--remote-debugging-port=0", "about:blank")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // its children end with it
	said, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait() // it was killed: its status says so
	})
	address := ""
	for lines := bufio.NewScanner(said); address == "" && lines.Scan(); {
		_, address, _ = strings.Cut(lines.Text(), "DevTools listening on ")
	}
	if address == "" {
		t.Fatal("chromium ended before it listened")
	}
	go func() { _, _ = io.Copy(io.Discard, said) }() // ends with the process
	conn, _, err := websocket.Dial(ctx, address, nil)
	if err != nil {
		t.Fatal(err)
	}
	conn.SetReadLimit(64 << 20)
	b := &browser{t: t, conn: conn, ctx: ctx, answers: map[int]chan answer{}}
	go b.read()
	var target struct{ TargetID string }
	b.call("Target.createTarget", map[string]any{"url": "about:blank"}, &target)
	var attached struct{ SessionID string }
	b.call("Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true}, &attached)
	b.session = attached.SessionID
	for _, domain := range []string{"Page", "Runtime", "Log"} {
		b.call(domain+".enable", nil, nil)
	}
	return b
}

// discard removes a browser's profile. Its processes have been told to end, and until the
// last one has a folder may be written to while it is emptied.
func discard(t testing.TB, profile string) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(browserWait); ; <-tick.C {
		err := os.RemoveAll(profile)
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("the browser's profile stays behind: %v", err)
			return
		}
	}
}

// read ends with the connection.
func (b *browser) read() {
	for {
		_, raw, err := b.conn.Read(b.ctx)
		if err != nil {
			return
		}
		var m struct {
			ID     int
			Method string
			Params struct {
				Type             string
				Args             []struct{ Value any }
				Entry            struct{ Level, Text, URL string }
				ExceptionDetails struct{ Text string }
			}
			Result, Error json.RawMessage
		}
		if json.Unmarshal(raw, &m) != nil {
			continue
		}
		b.mu.Lock()
		switch {
		case m.Method == "Runtime.exceptionThrown":
			b.faults = append(b.faults, string(raw))
		case m.Method == "Runtime.consoleAPICalled" && m.Params.Type == "error",
			m.Method == "Log.entryAdded" && m.Params.Entry.Level == "error":
			b.faults = append(b.faults, fmt.Sprint(m.Params.Entry, m.Params.Args))
		}
		if c := b.answers[m.ID]; c != nil && m.ID != 0 {
			delete(b.answers, m.ID)
			c <- answer{m.Result, m.Error}
		}
		b.mu.Unlock()
	}
}

// ask has one command carried out and returns what the browser refused it with, if it did.
func (b *browser) ask(method string, params any, into any) (refusal string) {
	b.t.Helper()
	b.next++
	answers := make(chan answer, 1)
	b.mu.Lock()
	b.answers[b.next] = answers
	b.mu.Unlock()
	raw, err := json.Marshal(map[string]any{"id": b.next, "method": method, "params": params, "sessionId": b.session})
	if err != nil {
		b.t.Fatal(err)
	}
	if b.session == "" {
		raw, _ = json.Marshal(map[string]any{"id": b.next, "method": method, "params": params})
	}
	if err := b.conn.Write(b.ctx, websocket.MessageText, raw); err != nil {
		b.t.Fatalf("%s: %v", method, err)
	}
	var got answer
	select {
	case got = <-answers:
	case <-time.After(browserWait):
		b.t.Fatalf("%s: no answer", method)
	}
	if got.refusal != nil {
		return string(got.refusal)
	}
	if into != nil {
		if err := json.Unmarshal(got.result, into); err != nil {
			b.t.Fatalf("%s: %v: %s", method, err, got.result)
		}
	}
	return ""
}

// call is ask for a command that nothing may be in the way of.
func (b *browser) call(method string, params any, into any) {
	b.t.Helper()
	if refusal := b.ask(method, params, into); refusal != "" {
		b.t.Fatalf("%s: %s", method, refusal)
	}
}

// eval returns the value of an expression as text. It is asked again when the browser
// refuses, as it does when the page is replaced by the next one between question and answer
// ("Inspected target navigated or closed", "Cannot find default execution context").
func (b *browser) eval(expression string) string {
	b.t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(browserWait); ; <-tick.C {
		var out struct{ Result struct{ Value any } }
		refusal := b.ask("Runtime.evaluate", map[string]any{"expression": "String(" + expression + ")"}, &out)
		if refusal == "" {
			return fmt.Sprint(out.Result.Value)
		}
		if time.Now().After(deadline) {
			b.t.Fatalf("%s: %s", expression, refusal)
		}
	}
}

// until waits for an expression to be true; a page that is being replaced is not.
func (b *browser) until(what, expression string) {
	b.t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(browserWait); ; {
		if b.eval("(() => { try { return "+expression+" } catch (e) { return e } })()") == "true" {
			return
		}
		if time.Now().After(deadline) {
			b.t.Fatalf("never: %s\n%s", what, b.eval("document.body.innerText"))
		}
		<-tick.C
	}
}

func (b *browser) open(url string) {
	b.t.Helper()
	b.call("Page.navigate", map[string]any{"url": url}, nil)
	b.until(url+" is loaded", fmt.Sprintf("location.href === %q && document.readyState === 'complete' && !!document.querySelector('h1')", url))
}

// sees waits for a text in an element.
func (b *browser) sees(selector, text string) {
	b.t.Helper()
	b.until(fmt.Sprintf("%q in %s", text, selector), fmt.Sprintf("document.querySelector(%q).innerText.includes(%q)", selector, text))
}

// press presses keys one after the other, as a keyboard does.
func (b *browser) press(keys ...string) {
	b.t.Helper()
	for _, k := range keys {
		code := map[string]int{"Tab": 9, "Enter": 13}[k]
		p := map[string]any{"type": "keyDown", "key": k, "code": k, "windowsVirtualKeyCode": code}
		if k == "Enter" {
			p["text"] = "\r"
		} else if code == 0 {
			p["text"] = k
		}
		b.call("Input.dispatchKeyEvent", p, nil)
		p = map[string]any{"type": "keyUp", "key": k, "code": k, "windowsVirtualKeyCode": code}
		b.ask("Input.dispatchKeyEvent", p, nil) // refused where the page went with the key's first half
	}
}

// write puts a text into the field that has the focus.
func (b *browser) write(text string) {
	b.t.Helper()
	b.call("Input.insertText", map[string]any{"text": text}, nil)
	b.until("the text is in the field", fmt.Sprintf("document.activeElement.value === %q", text))
}

// tabTo presses Tab until the focus is on what the expression e says. A page takes keys for
// sure when its scripts have run.
func (b *browser) tabTo(what, e string) {
	b.t.Helper()
	b.until("the page is loaded", "document.readyState === 'complete'")
	for range 80 {
		b.press("Tab")
		if b.eval("(e => "+e+")(document.activeElement)") == "true" {
			return
		}
	}
	b.t.Fatalf("%s cannot be reached with the keyboard", what)
}

func (b *browser) button(name string) {
	b.t.Helper()
	b.tabTo("button "+name, fmt.Sprintf("e.tagName === 'BUTTON' && e.textContent === %q", name))
	b.press("Enter")
}

// shot keeps a picture of the page where OUTRIGGER_SHOTS says, for people to look at.
func (b *browser) shot(name string) {
	b.t.Helper()
	dir := os.Getenv("OUTRIGGER_SHOTS")
	if dir == "" {
		return
	}
	var out struct{ Data string }
	b.call("Page.captureScreenshot", map[string]any{"captureBeyondViewport": true}, &out)
	png, err := base64.StdEncoding.DecodeString(out.Data)
	if err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, name+".png"), png, 0o600); err != nil {
		b.t.Fatal(err)
	}
}

func (b *browser) width(w int, dark bool) {
	b.call("Emulation.setDeviceMetricsOverride", map[string]any{"width": w, "height": 900, "deviceScaleFactor": 1, "mobile": false}, nil)
	scheme := "light"
	if dark {
		scheme = "dark"
	}
	b.call("Emulation.setEmulatedMedia", map[string]any{"features": []map[string]string{{"name": "prefers-color-scheme", "value": scheme}}}, nil)
}

func (b *browser) complaints() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Join(b.faults, "\n")
}

// TestPagesInABrowser: a person signs in, approves, promotes and aborts with the keyboard
// alone, and looks at the past, on the pages of a real control plane. Then every page is
// looked at in a window 400 pixels wide.
//
//  1. otto starts a rollout that wants the yes of one person; sidecars report.
//  2. olga signs in, approves and promotes; the page follows without being loaded again
//     when the hold of somebody else arrives; she aborts.
//  3. A version fails: the alert is on the page that is open, and she silences it.
//  4. The position before the promotion shows the canary as it was, and no buttons.
//  5. A form that was made before something happened is refused, and the page says why.
func TestPagesInABrowser(t *testing.T) {
	p := start(t, memory.New(), func(o *control.Options) { o.Access = people(t) })
	p.register("chat", "v1", "v2")
	r, err := p.admin.StartRollout(as(t.Context(), "otto"), &pb.StartRolloutRequest{Id: "spring", Model: "chat", Candidate: "v2",
		Phases: []*pb.RolloutPhase{
			{Name: "canary", Weight: 100, MinDuration: durationpb.New(time.Hour), Gates: []*pb.RolloutGate{
				{Name: "people", Kind: deploy.GateApproval, Approvals: 1},
				{Name: "quality", Kind: deploy.GateMetrics, DryRun: true, Conditions: []string{"error_rate < 0.01"}}}},
			{Name: "limited_production", Weight: 1000, MinDuration: durationpb.New(time.Hour)}, {Name: "full_production", Weight: 10_000}}})
	if err != nil {
		t.Fatal(err)
	}
	reports, err := pb.NewReportsClient(p.conn).Push(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	epoch := r.GetWeightEpoch()
	if err := reports.Send(&pb.Delta{Reporter: "pod", Sequence: 1, Node: &pb.Node{Id: "n", Kind: "sidecar"},
		Outcomes: []*pb.OutcomeDelta{outcomes("v2", epoch, 120, 3, time.Now()), outcomes("v1", epoch, 9880, 98, time.Now())}}); err != nil {
		t.Fatal(err)
	}
	if _, err := reports.Recv(); err != nil {
		t.Fatal(err)
	}
	web := httptest.NewServer(p.srv.Handler())
	t.Cleanup(web.Close)
	b := newBrowser(t) // ends first: a stream that is open holds the server up
	b.width(1280, false)

	b.open(web.URL + "/login")
	b.until("the field for a token has the focus", "document.hasFocus() && document.activeElement.tagName === 'INPUT'")
	b.write(secretOf + "olga")
	b.press("Enter")
	b.until("signed in", "location.pathname === '/' && document.querySelector('.who').innerText === 'olga, operator'")
	b.sees("#link", "live")
	b.sees("#figures", "98.99 %") // of 10 000 requests 101 failed
	b.shot("overview")
	b.tabTo("Rollouts", "e.textContent.trim() === 'Rollouts'")
	b.press("Enter")
	b.sees("h1", "Rollouts")
	b.tabTo("spring", "e.textContent === 'spring'")
	b.press("Enter")
	b.sees("#state", "running")
	b.sees("#weight", "1 %")
	b.sees("#gates", "0 of 1 approvals")
	b.sees("#gates .inconclusive", "inconclusive")
	b.sees("#gates", "needs about")
	b.sees("#evidence", "candidate 3 of 120 failed (2.50 %)")
	b.shot("rollout")
	b.button("Approve")
	b.sees("#done", "Approved.")
	b.sees("#gates", "approved by olga")
	b.sees("#gates .pass .chip", "pass")
	before := p.rollout("spring").GetSequence()
	position := p.log.Head()
	b.button("Promote")
	b.sees("#done", "Promoted")
	b.sees("#weight", "10 %")
	if _, err := p.admin.HoldRollout(as(t.Context(), "oscar"), &pb.RolloutActionRequest{Id: "spring", Reason: "lunch"}); err != nil {
		t.Fatal(err)
	}
	b.sees("#state", "held") // nobody loaded the page again
	b.open(web.URL + "/rollouts/spring")
	b.button("Abort")
	b.sees("#done", "Aborted")
	b.sees("#weight", "0 %")
	b.sees("#state", "rolled back")
	b.shot("aborted")
	if got := p.rollout("spring"); got.GetState() != "rolled_back" || got.GetSequence() < before+3 {
		t.Errorf("the rollout is %v", got)
	}

	// A tenth of all requests fails: the alert shows up on the page that is open.
	b.open(web.URL + "/alerts")
	if err := reports.Send(&pb.Delta{Reporter: "pod", Sequence: 2, Node: &pb.Node{Id: "n", Kind: "sidecar"},
		Outcomes: []*pb.OutcomeDelta{outcomes("v1", p.rollout("spring").GetWeightEpoch(), 5000, 500, time.Now())}}); err != nil {
		t.Fatal(err)
	}
	if _, err := reports.Recv(); err != nil {
		t.Fatal(err)
	}
	b.sees(".alerts .critical", "error_rate of chat v1 over the last minute")
	b.sees(".alerts .numbers", "condition")
	b.shot("alerts")
	b.open(web.URL + "/alerts")
	b.button("Silence for 1 h")
	b.sees("#done", "Silenced for an hour.")
	b.sees(".alerts .critical small", "silenced until")
	b.shot("silenced")
	b.open(web.URL + "/dashboards")
	b.sees("#production_overview", "Mean response time")
	b.sees("#alert_summary", "error_rate of chat v1")
	b.shot("dashboards")

	b.open(web.URL + "/audit")
	b.sees("#list", "approved by olga")
	b.until("the field for a moment has the focus", "(document.getElementById('at').focus(), true)")
	b.write(fmt.Sprint(position))
	b.press("Enter")
	b.sees("#past", fmt.Sprintf("position %d", position))
	b.shot("past")
	b.open(fmt.Sprintf("%s/rollouts/spring?at=%d", web.URL, position))
	b.sees("#weight", "1 %")
	b.sees("#state", "running")
	b.sees("#gates", "no data")
	if b.eval("document.querySelectorAll('#act').length") != "0" {
		t.Error("the past can be acted on")
	}
	for _, dark := range []bool{false, true} {
		b.width(400, dark)
		for _, path := range []string{"/", "/rollouts", "/rollouts/spring", "/experiments", "/models", "/optimisers", "/regions", "/cache", "/alerts", "/audit", "/dashboards", "/login"} {
			b.open(web.URL + path)
			if w := b.eval("(d => d.scrollWidth + ' of ' + d.clientWidth + ' ' + (d.scrollWidth > d.clientWidth || innerWidth !== 400))(document.documentElement)"); !strings.HasSuffix(w, "false") {
				t.Errorf("%s scrolls to the side in a window of 400 pixels: %s", path, w)
			}
			b.shot(fmt.Sprintf("narrow%s-%v", strings.ReplaceAll(path, "/", "-"), dark))
		}
	}
	if got := b.complaints(); got != "" {
		t.Errorf("the browser complains:\n%s", got)
	}
	b.width(1280, true)
	for _, path := range []string{"/models", "/regions", "/audit", "/dashboards", "/alerts", "/cache"} {
		b.open(web.URL + path)
		b.shot("dark" + strings.ReplaceAll(path, "/", "-"))
	}
	if _, err := p.admin.SetModelVersionState(as(t.Context(), "ada"), &pb.SetModelVersionStateRequest{Model: "chat", Version: "v2", State: "registered"}); err != nil {
		t.Fatal(err)
	}
	if _, err := p.admin.StartRollout(as(t.Context(), "ada"), &pb.StartRolloutRequest{Id: "again", Model: "chat", Candidate: "v2", Force: true,
		Phases: []*pb.RolloutPhase{{Name: "canary", Weight: 100, MinDuration: durationpb.New(time.Hour)}}}); err != nil {
		t.Fatal(err)
	}
	b.open(web.URL + "/rollouts/again")
	for _, held := range []bool{true, false} { // what olga sees is running, but its sequence is old
		var err error
		if held {
			_, err = p.admin.HoldRollout(as(t.Context(), "ada"), &pb.RolloutActionRequest{Id: "again"})
		} else {
			_, err = p.admin.ResumeRollout(as(t.Context(), "ada"), &pb.RolloutActionRequest{Id: "again"})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	b.button("Abort")
	b.sees("#problem", "has moved on")
	b.shot("stale")
	if got := p.rollout("again").GetState(); got != "running" {
		t.Errorf("a stale form made it %s", got)
	}
	if e := p.refused(); len(e) == 0 || e[len(e)-1].GetActor() != "olga" {
		t.Errorf("recorded %v", e)
	}
}
