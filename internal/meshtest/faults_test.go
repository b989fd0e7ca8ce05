package meshtest

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	gstatus "google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/api/snakepit"
	"github.com/outrigger-mesh/outrigger/internal/pause"
)

// The fault simulation of the whole mesh: 3 nodes with 2 pods each, clients that read and
// write over the bridge protocol, links that are cut, slow or stalled, a control plane
// that crashes and comes back over its log, sidecars that restart. Afterwards the log,
// which is the truth, is held against what every application was told; judge_test.go says
// by which rules.
//
// A seed draws the clients' requests and the faults with their (fake) times. What two
// goroutines do at one instant is decided by the scheduler, so a seed that failed may have
// to be run a few times to fail again.

var (
	faultSeed  = flag.Uint64("seed", 0, "the one seed TestFaults runs; 0 = a range that changes by the day")
	faultSeeds = flag.Uint64("seeds", 0, "how many seeds TestFaults runs; 0 = 24, or 500 with OUTRIGGER_LONG=1")
)

const (
	faultNodes, faultPods = 3, 2 // pods per node
	faultTime             = 2 * time.Second
	healTime              = 4 * time.Second
	feedLease             = 300 * time.Millisecond // cache/node's default
)

// faultKeys are session and name of the variables. The second session is deleted and
// made again.
var faultKeys = [...][2]string{{"s", "a"}, {"s", "b"}, {"s", "c"}, {"u", "a"}, {"u", "b"}}

// opKind is what a client asked for.
type opKind uint8

const (
	opGet opKind = iota
	opSet
	opRegister
	opDelete
	opCleanup // delete the session
)

func (k opKind) String() string {
	return [...]string{"get", "set", "register", "delete", "cleanup"}[k]
}

// op is one request as its client saw it. Times are since the mesh was ready; of two ops
// with ended < began (ticks) the first was over before the second was sent.
type op struct {
	kind         opKind
	key          int
	pod, life    int
	carrier      int // the client's number if it carries a token, else -1
	level        outrigger.Consistency
	value        string // written, or read; "" = there is none
	from, to     time.Duration
	began, ended uint64
	code         codes.Code
	text         string // of an error
	tier         string
	age          time.Duration
	live, stale  bool
	explained    string
}

func (o *op) String() string {
	s := fmt.Sprintf("[%v, %v] pod %d life %d: %v %s/%s", o.from.Round(time.Microsecond), o.to.Round(time.Microsecond), o.pod, o.life, o.kind, faultKeys[o.key][0], faultKeys[o.key][1])
	if o.kind == opGet {
		s += " " + o.level.String()
	}
	if o.carrier >= 0 {
		s += fmt.Sprintf(" by carrier %d", o.carrier)
	}
	if o.code != codes.OK {
		return s + " failed: " + o.code.String() + " " + o.text
	}
	return s + fmt.Sprintf(" = %q (%s, age %v, live %v, stale %v) %s", o.value, o.tier, o.age, o.live, o.stale, o.explained)
}

// podLife is a pod in one of its lives.
type podLife struct {
	*Pod
	life int
}

// faultRun is one seed.
type faultRun struct {
	w     *World
	seed  uint64
	start time.Time
	pods  [faultNodes * faultPods]atomic.Pointer[podLife]
	tick  atomic.Uint64
	// What the judge must notice: clients that lose their tokens, and bounds that are
	// stricter than what is promised.
	forget bool
	lease  time.Duration
	value  atomic.Uint64 // every write has its own

	mu  sync.Mutex
	ops []*op
}

// random returns the generator of one actor, so that what one does leaves the others'
// draws alone.
func (f *faultRun) random(actor uint64) *rand.Rand { return rand.New(rand.NewPCG(f.seed, actor)) }

func millis(r *rand.Rand, from, to int) time.Duration {
	return time.Duration(from)*time.Millisecond + time.Duration(r.Int64N(int64(to-from)*int64(time.Millisecond)))
}

// playFaults runs one seed in a bubble and returns what was observed.
func playFaults(t *testing.T, f *faultRun) *judge {
	seed := f.seed
	f.w, f.start = New(t, Options{Nodes: faultNodes, PodsPerNode: faultPods}), time.Now()
	defer f.w.Stop()
	for i, p := range f.w.Pods {
		f.pods[i].Store(&podLife{Pod: p})
	}
	for k := range faultKeys {
		if o := f.register(f.pods[0].Load(), 0, k, -1); o.code != codes.OK {
			t.Fatalf("seed %d: %v", seed, o)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), faultTime)
	defer cancel()
	var clients sync.WaitGroup
	for i := range f.pods {
		for c := range 2 {
			r := f.random(uint64(100 + 10*i + c))
			clients.Go(func() { f.client(ctx, r, i) })
		}
	}
	for c := range 2 {
		r := f.random(uint64(200 + c))
		clients.Go(func() { f.carry(ctx, r, c) })
	}
	f.disturb(ctx)
	clients.Wait()
	f.heal()
	time.Sleep(healTime)
	j := newJudge(t, f)
	for i := range f.pods {
		for k := range faultKeys {
			j.settled(f.get(f.pods[i].Load(), i, k, outrigger.Consistency{}, -1, nil))
		}
	}
	return j
}

// client is one application process: it reads, and writes now and then.
func (f *faultRun) client(ctx context.Context, r *rand.Rand, pod int) {
	for pause.For(ctx, millis(r, 5, 60)) {
		p, key := f.pods[pod].Load(), r.IntN(len(faultKeys))
		switch d := r.IntN(40); {
		case d < 5:
			f.write(r, p, pod, key, -1)
		case d < 10:
			f.get(p, pod, key, outrigger.Consistency{Level: outrigger.Strong}, -1, nil)
		case d < 14:
			f.get(p, pod, key, outrigger.Consistency{Level: outrigger.Bounded, MaxAge: millis(r, 40, 400)}, -1, nil)
		case d < 16:
			f.get(p, pod, key, outrigger.Consistency{Level: outrigger.Eventual}, -1, nil)
		default:
			f.get(p, pod, key, outrigger.Consistency{}, -1, nil)
		}
	}
}

// carry is a client that goes from pod to pod with its session token.
func (f *faultRun) carry(ctx context.Context, r *rand.Rand, number int) {
	tokens := map[string]string{} // by session
	for pause.For(ctx, millis(r, 10, 60)) {
		pod, key := r.IntN(len(f.pods)), r.IntN(len(faultKeys))
		p := f.pods[pod].Load()
		if r.IntN(6) == 0 {
			f.set(p, pod, key, number, tokens)
		} else {
			f.get(p, pod, key, outrigger.Consistency{}, number, tokens)
		}
	}
}

func (f *faultRun) write(r *rand.Rand, p *podLife, pod, key, carrier int) {
	o := f.begin(opSet, p, pod, key, carrier)
	switch d := r.IntN(10); {
	case d < 1:
		o.kind = opDelete
		f.call(o, nil, func(ctx context.Context) (metadata.MD, error) {
			_, err := p.Bridge.DeleteVariable(ctx, &snakepit.DeleteVariableRequest{SessionId: faultKeys[key][0], VariableIdentifier: faultKeys[key][1]})
			return nil, err
		})
	case d < 2 && faultKeys[key][0] == "u":
		o.kind = opCleanup
		f.call(o, nil, func(ctx context.Context) (metadata.MD, error) {
			_, err := p.Bridge.CleanupSession(ctx, &snakepit.CleanupSessionRequest{SessionId: faultKeys[key][0]})
			return nil, err
		})
	default:
		if o := f.set(p, pod, key, carrier, nil); o.code == codes.NotFound {
			f.register(p, pod, key, carrier)
		}
	}
}

func (f *faultRun) set(p *podLife, pod, key, carrier int, tokens map[string]string) *op {
	o := f.begin(opSet, p, pod, key, carrier)
	o.value = f.next()
	return f.call(o, tokens, func(ctx context.Context) (head metadata.MD, err error) {
		r, err := p.Bridge.SetVariable(ctx, &snakepit.SetVariableRequest{SessionId: faultKeys[key][0], VariableIdentifier: faultKeys[key][1], Value: float(o.value)}, grpc.Header(&head))
		if err == nil && !r.Success {
			err = gstatus.Error(codes.Internal, "an unconditional set was refused: "+r.ErrorMessage)
		}
		return head, err
	})
}

func (f *faultRun) register(p *podLife, pod, key, carrier int) *op {
	o := f.begin(opRegister, p, pod, key, carrier)
	o.value = f.next()
	return f.call(o, nil, func(ctx context.Context) (metadata.MD, error) {
		return nil, p.Register(ctx, faultKeys[key][0], faultKeys[key][1], o.value)
	})
}

func (f *faultRun) next() string { return strconv.FormatUint(f.value.Add(1), 10) }

func (f *faultRun) get(p *podLife, pod, key int, level outrigger.Consistency, carrier int, tokens map[string]string) *op {
	o := f.begin(opGet, p, pod, key, carrier)
	o.level = level
	f.call(o, tokens, func(ctx context.Context) (head metadata.MD, err error) {
		if level != (outrigger.Consistency{}) {
			ctx = metadata.AppendToOutgoingContext(ctx, outrigger.HeaderConsistency, level.String())
		}
		r, err := p.Bridge.GetVariable(ctx, &snakepit.GetVariableRequest{SessionId: faultKeys[key][0], VariableIdentifier: faultKeys[key][1]}, grpc.Header(&head))
		o.value = string(r.GetVariable().GetValue().GetValue())
		return head, err
	})
	if o.code == codes.NotFound && o.tier != "" && o.tier != outrigger.TierNone.String() {
		o.code = codes.OK // that there is none is an answer, too
	}
	return o
}

func (f *faultRun) begin(kind opKind, p *podLife, pod, key, carrier int) *op {
	return &op{kind: kind, key: key, pod: pod, life: p.life, carrier: carrier, from: time.Since(f.start), began: f.tick.Add(1)}
}

// call makes one request and records it. tokens, when given, are brought and kept.
func (f *faultRun) call(o *op, tokens map[string]string, do func(context.Context) (metadata.MD, error)) *op {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	session := faultKeys[o.key][0]
	if t := tokens[session]; t != "" && !f.forget {
		ctx = metadata.AppendToOutgoingContext(ctx, outrigger.HeaderToken, t)
	}
	head, err := do(metadata.AppendToOutgoingContext(ctx, outrigger.HeaderExplain, "true"))
	o.to, o.ended = time.Since(f.start), f.tick.Add(1)
	first := func(k string) string {
		if v := head.Get(k); len(v) > 0 {
			return v[0]
		}
		return ""
	}
	if t := first(outrigger.HeaderToken); t != "" && tokens != nil {
		tokens[session] = t
	}
	age, _ := strconv.Atoi(first(outrigger.HeaderAge)) // absent = 0, the strictest
	o.code, o.text, o.tier, o.age = gstatus.Code(err), gstatus.Convert(err).Message(), first(outrigger.HeaderTier), time.Duration(age)*time.Millisecond
	o.explained = first(outrigger.HeaderExplain)
	o.live, o.stale = first(outrigger.HeaderFeed) == "live", first(outrigger.HeaderStale) == "true"
	f.mu.Lock()
	f.ops = append(f.ops, o)
	f.mu.Unlock()
	return o
}

// disturb makes faults until ctx ends.
func (f *faultRun) disturb(ctx context.Context) {
	r := f.random(1)
	var healing sync.WaitGroup
	defer healing.Wait()
	for pause.For(ctx, millis(r, 20, 200)) {
		node := fmt.Sprintf("node-%d", r.IntN(faultNodes))
		switch d := r.IntN(10); {
		case d < 3:
			f.w.Net.Cut(node, "control")
			f.later(&healing, ctx, millis(r, 5, 700), func() { f.w.Net.Heal(node, "control") })
		case d < 6: // slow, in one direction or both
			if r.IntN(2) == 0 {
				f.w.Net.SetDelay(node, "control", millis(r, 1, 120))
			}
			f.w.Net.SetDelay("control", node, millis(r, 1, 200))
			f.later(&healing, ctx, millis(r, 50, 600), func() { f.quick(node) })
		case d < 7: // a black hole: what is sent now arrives when everybody has given up
			f.w.Net.SetDelay("control", node, millis(r, 800, 2500))
			f.later(&healing, ctx, millis(r, 5, 100), func() { f.quick(node) })
		case d < 8:
			f.w.StopControl()
			pause.For(ctx, millis(r, 5, 500))
			f.w.StartControl()
		default:
			i := r.IntN(len(f.pods))
			f.pods[i].Store(&podLife{f.w.RestartPod(i), f.pods[i].Load().life + 1})
		}
	}
}

func (f *faultRun) later(wg *sync.WaitGroup, ctx context.Context, d time.Duration, do func()) {
	wg.Go(func() {
		pause.For(ctx, d)
		do()
	})
}

func (f *faultRun) quick(node string) {
	f.w.Net.SetDelay(node, "control", 500*time.Microsecond)
	f.w.Net.SetDelay("control", node, 500*time.Microsecond)
}

func (f *faultRun) heal() {
	for i := range faultNodes {
		node := fmt.Sprintf("node-%d", i)
		f.w.Net.Heal(node, "control")
		f.quick(node)
	}
}

func TestFaults(t *testing.T) {
	base, count := uint64(time.Now().Unix())/86400*1_000_000, uint64(24)
	if raceEnabled {
		count = 6
	}
	if os.Getenv("OUTRIGGER_LONG") == "1" {
		count = 500
	}
	if *faultSeeds > 0 {
		count = *faultSeeds
	}
	if *faultSeed > 0 {
		base, count = *faultSeed, 1
	}
	start := time.Now()
	var sum judgement
	for seed := base; seed < base+count && !t.Failed(); seed++ {
		synctest.Test(t, func(t *testing.T) {
			j := playFaults(t, &faultRun{seed: seed, lease: feedLease})
			j.all()
			sum.add(j.judgement)
			if len(j.violations) > 0 {
				t.Errorf("seed %d: %d violations, the first ones:\n%s\nrepeat with: go test -run 'TestFaults$' ./internal/meshtest -seed %d", seed, len(j.violations), j.report(), seed)
			}
		})
	}
	took := time.Since(start)
	t.Logf("%d seeds from %d in %v, %.1f a second: %+v", count, base, took.Round(time.Millisecond), float64(count)/took.Seconds(), sum)
	if count >= 20 && !t.Failed() {
		sum.busy(t)
	}
}

// The judge is worth something only if it notices: clients that lose their session tokens
// on the way to the next pod go back in time now and then, and copies do get older than a
// few milliseconds.
func TestJudgeNotices(t *testing.T) {
	for _, broken := range []struct {
		kind   string
		forget bool
		lease  time.Duration
	}{
		{"session", true, feedLease},
		{"stale", false, 5 * time.Millisecond},
	} {
		t.Run(broken.kind, func(t *testing.T) {
			for seed := range uint64(60) {
				found := false
				synctest.Test(t, func(t *testing.T) {
					j := playFaults(t, &faultRun{seed: seed + 1, forget: broken.forget, lease: broken.lease})
					j.all()
					found = slices.ContainsFunc(j.violations, func(v string) bool { return strings.HasPrefix(v, broken.kind+": ") })
				})
				if found {
					return
				}
			}
			t.Error("60 seeds, and nothing was noticed")
		})
	}
}
