package deploy

import (
	"cmp"
	"math"
	"slices"
	"strconv"
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// Stratum is what is compared like with like: one region in one weight epoch. Pooling
// regions or weights would blame the candidate for serving in a worse place.
type Stratum struct {
	Region      string
	WeightEpoch uint64
}

// String returns "region/epoch", as in Evidence.
func (s Stratum) String() string { return s.Region + "/" + strconv.FormatUint(s.WeightEpoch, 10) }

// All names the combination of every stratum in Evidence and Verdict.
const All = "all"

// Sample is what happened in one stratum since the previous sample. Requests are
// logical requests (retries are not counted, nor are answers from a cache); failures
// are distinct units (user, else session) with a failure, so that one broken session
// retrying a hundred times counts once.
//
// Where a sample begins and ends may depend on the time, on totals and on failures
// having happened, never on which of the two versions they happened to.
type Sample struct {
	Stratum           Stratum
	CandidateRequests uint64
	CandidateFailures uint64
	BaselineRequests  uint64
	BaselineFailures  uint64
	// FirstFailure is when the sample's first candidate failure happened; zero = unknown.
	FirstFailure time.Time
}

// Config of a Detector; zero fields get the defaults.
type Config struct {
	// Alpha bounds the probability of a false rollback in one phase. Default 0.01.
	Alpha float64
	// Margin is the relative risk that is still called "no worse". Default 1.10.
	Margin float64
	// Horizon is T, the number of batches the Shiryaev–Roberts part promises Alpha for.
	// Default 86 400: a day at one batch a second.
	Horizon uint64
	// MinBatch is how many requests, both versions together, a batch needs before it is
	// weighed. A batch of one request says nothing about shares. Default 10.
	MinBatch uint64
	// MaxFailureRate is the absolute limit: a candidate certainly above it holds the
	// rollout. Default 0.05.
	MaxFailureRate float64
	// WeightEpoch is the oldest epoch that counts; older samples are ignored.
	WeightEpoch uint64
}

// Detector accumulates evidence that the candidate fails more often than the baseline.
//
// The question asked of each failure is "whose was it?". If the candidate is no worse
// than r (Margin) times the baseline, a failure is the candidate's with probability at
// most w = r·n_c/(r·n_c+n_t), whatever the failure rate is. Against it stand the
// alternatives that the relative risk is k times that, k ∈ {1.5, 2, 3, 5, 10}:
//
//	ℓ_k += e_c·ln(k/(kw+1−w)) − e_t·ln(kw+1−w)        per stratum and batch
//	E    = mean_k exp ℓ_k                             since the phase began
//	R_k  = (1+R_k)·exp(increment),  R = mean_k R_k    for changes in mid-phase
//
// E is a nonnegative supermartingale under "no worse", so by Ville's inequality it ever
// reaches 2/α with probability at most α/2; R_n − n is one too, so R reaches 2T/α within
// T batches with probability at most α/2. Both may be looked at after every batch.
// Sources: Shafer and Vovk, Game-Theoretic Foundations (test martingales); Shiryaev–
// Roberts e-detectors, Shin, Ramdas and Rinaldo 2022 (arXiv 2203.03532); conditioning
// on totals is Fisher's.
//
// α is shared out so that the sum over everything watched stays within it, however many
// regions turn up: half to the combination of all strata (the product of their
// likelihood ratios), which sees a candidate that is bad everywhere, and 1/(2j(j+1)) to
// the j-th stratum seen, which sees one that is bad in a single region.
//
// All sums are kept as logarithms and cannot overflow. A Detector is not safe for
// concurrent use. It uses about 300 bytes per stratum, and MaxStrata of them at most;
// samples of further strata are ignored.
type Detector struct {
	cfg     Config
	all     process
	strata  []*stratum // in the order first seen
	window  [windowSamples]arms
	at      int // next slot of window
	tripped string
	firstAt time.Time
}

// MaxStrata bounds the strata a Detector follows one by one.
const MaxStrata = 256

// windowSamples is how many Observe calls the absolute limit looks back over.
const windowSamples = 60

// risks are the alternatives' relative risks; changeRisk is the index of the one used to
// date the change (the middle one).
var risks = [...]float64{1.5, 2, 3, 5, 10}

const changeRisk = 2

// arms are requests and failures of both sides.
type arms struct{ nc, ec, nt, et uint64 }

func (a *arms) add(b arms) {
	a.nc, a.ec, a.nt, a.et = a.nc+b.nc, a.ec+b.ec, a.nt+b.nt, a.et+b.et
}

type stratum struct {
	key     Stratum
	pending arms
	first   time.Time // first candidate failure in pending
	process
}

// process is one pair of (E, R).
type process struct {
	name  string
	share float64 // of α
	sum   arms
	ell   [len(risks)]float64
	logR  [len(risks)]float64 // ln R_k; −∞ at the start
	cusum float64
	bad   time.Time // first candidate failure since cusum was last 0
}

// NewDetector returns a detector without evidence.
func NewDetector(cfg Config) *Detector {
	cfg.Alpha = cmp.Or(cfg.Alpha, DefaultAlpha)
	cfg.Margin = cmp.Or(cfg.Margin, 1.10)
	cfg.Horizon = cmp.Or(cfg.Horizon, 86_400)
	cfg.MinBatch = cmp.Or(cfg.MinBatch, 10)
	cfg.MaxFailureRate = cmp.Or(cfg.MaxFailureRate, 0.05)
	return &Detector{cfg: cfg, all: newProcess(All, 0.5)}
}

func newProcess(name string, share float64) process {
	p := process{name: name, share: share}
	for k := range p.logR {
		p.logR[k] = math.Inf(-1)
	}
	return p
}

// Observe adds samples, at most one per stratum and call being the usual case. Samples
// of an epoch before Config.WeightEpoch and samples without requests are ignored.
func (d *Detector) Observe(samples []Sample) {
	d.window[d.at] = arms{}
	for _, s := range samples {
		if s.Stratum.WeightEpoch < d.cfg.WeightEpoch {
			continue
		}
		a := arms{s.CandidateRequests, min(s.CandidateFailures, s.CandidateRequests),
			s.BaselineRequests, min(s.BaselineFailures, s.BaselineRequests)}
		d.window[d.at].add(a)
		d.collect(s, a)
	}
	d.at = (d.at + 1) % windowSamples
	d.weigh()
}

// collect adds a sample to the pending batch of its stratum.
func (d *Detector) collect(s Sample, a arms) {
	if a.nc+a.nt == 0 {
		return
	}
	i := slices.IndexFunc(d.strata, func(t *stratum) bool { return t.key == s.Stratum })
	if i < 0 {
		if len(d.strata) >= MaxStrata {
			return
		}
		j := float64(len(d.strata) + 1)
		i = len(d.strata)
		d.strata = append(d.strata, &stratum{key: s.Stratum, process: newProcess(s.Stratum.String(), 1/(2*j*(j+1)))})
	}
	t := d.strata[i]
	t.pending.add(a)
	t.first = earlier(t.first, s.FirstFailure)
}

// weigh turns every batch that is large enough into evidence.
func (d *Detector) weigh() {
	var inc [len(risks)]float64
	var sum arms
	var first time.Time
	for _, t := range d.strata {
		if t.pending.nc+t.pending.nt < d.cfg.MinBatch {
			continue
		}
		one := d.increments(t.pending)
		t.update(t.pending, one, t.first)
		for k := range inc {
			inc[k] += one[k]
		}
		sum.add(t.pending)
		first = earlier(first, t.first)
		t.pending, t.first = arms{}, time.Time{}
	}
	if sum == (arms{}) {
		return
	}
	d.all.update(sum, inc, first)
	d.trip()
}

// increments are the log likelihood ratios of one batch.
func (d *Detector) increments(a arms) (inc [len(risks)]float64) {
	c := d.cfg.Margin * float64(a.nc)
	w := c / (c + float64(a.nt))
	ec, et := float64(a.ec), float64(a.et)
	for k, risk := range risks {
		norm := math.Log(risk*w + 1 - w)
		inc[k] = ec*(math.Log(risk)-norm) - et*norm
	}
	return inc
}

func (p *process) update(a arms, inc [len(risks)]float64, first time.Time) {
	p.sum.add(a)
	for k, x := range inc {
		p.ell[k] += x
		p.logR[k] = logOnePlus(p.logR[k]) + x
	}
	p.cusum = max(0, p.cusum+inc[changeRisk])
	switch {
	case p.cusum == 0:
		p.bad = time.Time{}
	case p.bad.IsZero():
		p.bad = first
	}
}

// trip remembers the first process over its threshold, because evidence that was
// sufficient once stays sufficient.
func (d *Detector) trip() {
	if d.tripped != "" {
		return
	}
	p := &d.all
	for i := 0; !p.proven(d.logThreshold(p), math.Log(float64(d.cfg.Horizon))); i++ {
		if i == len(d.strata) {
			return
		}
		p = &d.strata[i].process
	}
	d.tripped, d.firstAt = p.name, p.bad
}

// proven compares E with exp limit and R with exp (limit + horizon). A mean is not above
// its largest term, which is cheaper to look at and nearly always settles it.
func (p *process) proven(limit, horizon float64) bool {
	return slices.Max(p.ell[:]) >= limit && p.logE() >= limit ||
		slices.Max(p.logR[:]) >= limit+horizon && p.logSR() >= limit+horizon
}

// processes lists everything watched, the combination first.
func (d *Detector) processes() []*process {
	out := []*process{&d.all}
	for _, t := range d.strata {
		out = append(out, &t.process)
	}
	return out
}

func (d *Detector) logThreshold(p *process) float64 { return math.Log(2 / (d.cfg.Alpha * p.share)) }

func (p *process) logE() float64  { return logMeanExp(p.ell) }
func (p *process) logSR() float64 { return logMeanExp(p.logR) }

// Verdict is what the evidence amounts to.
type Verdict struct {
	// Roll is true once the evidence has sufficed for a rollback, and stays true.
	Roll bool
	// Stratum is what tripped: All or "region/epoch"; empty while Roll is false.
	Stratum string
	// FirstBad estimates when the regression began: the first candidate failure since
	// the evidence last started to climb from nothing. Zero if samples carried no times.
	FirstBad time.Time
	// Breach is true while the candidate's failure rate over the last 60 samples is above
	// MaxFailureRate at 97.5 % confidence (Wilson's lower bound), whatever the baseline.
	Breach bool
	// FailureRate is that rate, 0..1, and BaselineRate the baseline's.
	FailureRate, BaselineRate float64
	// Suspicion is the largest E of anything watched; 1 is indifference.
	Suspicion float64
	// Evidence is every number, the combination first, then strata as first seen.
	// e_value and sr_value/horizon are each compared with threshold; sr_value is given
	// already divided, so the one threshold serves both. Values are capped at 1e300.
	Evidence []*pb.Evidence
}

// Verdict returns the present verdict. The messages in it are fresh copies.
func (d *Detector) Verdict() Verdict {
	v := Verdict{Roll: d.tripped != "", Stratum: d.tripped, FirstBad: d.firstAt}
	for _, p := range d.processes() {
		e := expCapped(p.logE())
		v.Suspicion = max(v.Suspicion, e)
		if p.sum == (arms{}) {
			continue
		}
		v.Evidence = append(v.Evidence, &pb.Evidence{
			Stratum:           p.name,
			CandidateRequests: p.sum.nc, CandidateFailures: p.sum.ec,
			BaselineRequests: p.sum.nt, BaselineFailures: p.sum.et,
			EValue: e, SrValue: expCapped(p.logSR() - math.Log(float64(d.cfg.Horizon))),
			Threshold: expCapped(d.logThreshold(p)),
		})
	}
	var w arms
	for _, a := range d.window {
		w.add(a)
	}
	v.FailureRate, v.BaselineRate = rate(w.ec, w.nc), rate(w.et, w.nt)
	v.Breach = wilsonLower(w.ec, w.nc) > d.cfg.MaxFailureRate
	return v
}

// CandidateRequests is how many candidate requests of the phase have been observed,
// including those of a batch not weighed yet.
func (d *Detector) CandidateRequests() uint64 {
	n := d.all.sum.nc
	for _, t := range d.strata {
		n += t.pending.nc
	}
	return n
}

func rate(e, n uint64) float64 {
	if n == 0 {
		return 0
	}
	return float64(e) / float64(n)
}

// wilsonLower is the lower end of Wilson's 95 % interval for e of n; 0 for n = 0.
func wilsonLower(e, n uint64) float64 {
	if n == 0 {
		return 0
	}
	const z = 1.959964
	p, m := rate(e, n), float64(n)
	return (p + z*z/(2*m) - z*math.Sqrt(p*(1-p)/m+z*z/(4*m*m))) / (1 + z*z/m)
}

// logOnePlus is ln(1+eˣ) without overflow.
func logOnePlus(x float64) float64 {
	if x > 0 {
		return x + math.Log1p(math.Exp(-x))
	}
	return math.Log1p(math.Exp(x))
}

func logMeanExp(xs [len(risks)]float64) float64 {
	top := slices.Max(xs[:])
	if math.IsInf(top, -1) {
		return top
	}
	sum := 0.0
	for _, x := range xs {
		sum += math.Exp(x - top)
	}
	return top + math.Log(sum/float64(len(xs)))
}

// expCapped keeps values printable: JSON has no infinity.
func expCapped(x float64) float64 { return min(math.Exp(x), 1e300) }

func earlier(a, b time.Time) time.Time {
	if a.IsZero() || (!b.IsZero() && b.Before(a)) {
		return b
	}
	return a
}
