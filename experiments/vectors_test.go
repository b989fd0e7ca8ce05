package experiments

import (
	"bufio"
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// vector is a line of testdata/vectors.tsv.
type vector struct {
	kind, source string
	args         []json.RawMessage
	want         []float64
}

func (v vector) arg(t *testing.T, i int, into any) {
	t.Helper()
	if err := json.Unmarshal(v.args[i], into); err != nil {
		t.Fatalf("%s %s: argument %d: %v", v.kind, v.args, i, err)
	}
}

func (v vector) numbers(t *testing.T) []float64 {
	t.Helper()
	out := make([]float64, len(v.args))
	for i := range v.args {
		v.arg(t, i, &out[i])
	}
	return out
}

func (v vector) counts(t *testing.T) []uint64 {
	t.Helper()
	out := make([]uint64, len(v.args))
	for i := range v.args {
		v.arg(t, i, &out[i])
	}
	return out
}

func readVectors(t *testing.T) (out []vector) {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", "vectors.tsv"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		if strings.HasPrefix(sc.Text(), "#") {
			continue
		}
		fields := strings.Split(sc.Text(), "\t")
		if len(fields) != 4 {
			t.Fatalf("%d fields in %q", len(fields), sc.Text())
		}
		v := vector{kind: fields[0], source: fields[3]}
		if err := json.Unmarshal([]byte(fields[1]), &v.args); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal([]byte(fields[2]), &v.want); err != nil {
			t.Fatal(err)
		}
		out = append(out, v)
	}
	if err := sc.Err(); err != nil {
		t.Fatal(err)
	}
	return out
}

// samples are pairs per unit, of one arm.
func (v vector) samples(t *testing.T, i int) Sums {
	var xy [2][]float64
	v.arg(t, i, &xy)
	return pairs(xy[0], xy[1])
}

func pairs(x, y []float64) (s Sums) {
	for k := range x {
		must(0, s.Add(x[k], y[k]))
	}
	return s
}

// answers are ours to the questions of the table, by kind.
var answers = map[string]func(*testing.T, vector) []float64{
	"welch": func(t *testing.T, v vector) []float64 {
		var a, b []float64
		v.arg(t, 0, &a)
		v.arg(t, 1, &b)
		c := must(Compare(must(sample(a).Mean()), must(sample(b).Mean())))
		z, p, ci, err := WelchT(c, .05)
		if err != nil {
			t.Fatal(err)
		}
		return []float64{z, p, c.DF, ci.Low, ci.High}
	},
	"wilson": func(t *testing.T, v vector) []float64 {
		n := v.numbers(t)
		return ends(must(Wilson(uint64(n[0]), uint64(n[1]), n[2])))
	},
	"clopper_pearson": func(t *testing.T, v vector) []float64 {
		n := v.numbers(t)
		return ends(must(ClopperPearson(uint64(n[0]), uint64(n[1]), n[2])))
	},
	"newcombe": func(t *testing.T, v vector) []float64 {
		n := v.numbers(t)
		return ends(must(Newcombe(uint64(n[0]), uint64(n[1]), uint64(n[2]), uint64(n[3]), n[4])))
	},
	"pooled_z": func(t *testing.T, v vector) []float64 {
		n := v.counts(t)
		z, p, err := PooledZ(n[0], n[1], n[2], n[3])
		return must([]float64{z, p}, err)
	},
	"fisher": func(t *testing.T, v vector) []float64 {
		n := v.counts(t)
		return []float64{must(Fisher(n[0], n[1], n[2], n[3]))}
	},
	"holm": func(t *testing.T, v vector) []float64 {
		var p []float64
		v.arg(t, 0, &p)
		return must(Holm(p))
	},
	"bh": func(t *testing.T, v vector) []float64 {
		var p []float64
		v.arg(t, 0, &p)
		return must(BenjaminiHochberg(p))
	},
	"srm_chi_square": func(t *testing.T, v vector) []float64 {
		c := must(ChiSquareRatio(v.exposed(t), .001))
		return []float64{c.Statistic, c.P}
	},
	"srm_sequential": func(t *testing.T, v vector) []float64 {
		return []float64{math.Log(must(CheckSampleRatio(v.exposed(t), .001)).BayesFactor)}
	},
	"sequence": func(t *testing.T, v vector) []float64 {
		n := v.numbers(t)
		s := Sequence{Alpha: n[0], Tuning: n[1]}
		return []float64{s.HalfWidth(uint64(n[2])), s.P(n[3], uint64(n[2]))}
	},
	"proportion_sequence": func(t *testing.T, v vector) []float64 {
		n := v.numbers(t)
		return ends(must(Sequence{Alpha: n[0], Tuning: n[1]}.Proportion(uint64(n[2]), uint64(n[3]))))
	},
	"cuped": func(t *testing.T, v vector) []float64 {
		theta, e, err := CUPED([]Sums{v.samples(t, 0), v.samples(t, 1)})
		return must([]float64{theta, e[0].Value, e[0].Variance, e[1].Value, e[1].Variance}, err)
	},
	"ratio": func(t *testing.T, v vector) []float64 {
		var num, den []float64
		v.arg(t, 0, &num)
		v.arg(t, 1, &den)
		e := must(pairs(num, den).Ratio())
		return []float64{e.Value, e.Variance}
	},
	"cuped_ratio": func(t *testing.T, v vector) []float64 {
		var arms []Joint
		for i := range v.args {
			var u [4][]float64
			v.arg(t, i, &u)
			var j Joint
			for k := range u[0] {
				must(0, j.Add(u[0][k], u[1][k], u[2][k], u[3][k]))
			}
			arms = append(arms, j)
		}
		theta, e, err := CUPEDRatio(arms)
		return must([]float64{theta, e[0].Value, e[0].Variance, e[1].Value, e[1].Variance}, err)
	},
	"power_t": func(t *testing.T, v vector) []float64 {
		n := v.numbers(t)
		return []float64{must(Goal{SD: 1, MDE: n[1], Alpha: n[2], Power: .9, Method: MethodFixed}.PowerAt(uint64(n[0])))}
	},
	"gate_units": func(t *testing.T, v vector) []float64 {
		n := v.numbers(t)
		units, allowed, err := GateUnits(n[0], n[1], n[2], n[3])
		return must([]float64{float64(units), float64(allowed)}, err)
	},
	"chance_to_win": func(t *testing.T, v vector) []float64 {
		n := v.counts(t)
		chance, _, err := ChanceToWin(n[0], n[1], n[2], n[3])
		return must([]float64{chance}, err)
	},
	"crossing": func(t *testing.T, v vector) []float64 {
		var bounds, fractions []float64
		var drift float64
		v.arg(t, 0, &bounds)
		v.arg(t, 1, &fractions)
		v.arg(t, 2, &drift)
		return must(CrossingProbabilities(bounds, fractions, drift))
	},
	"sketch": func(t *testing.T, v vector) []float64 {
		var xs []float64
		var level float64
		v.arg(t, 0, &xs)
		v.arg(t, 1, &level)
		var q Quantiles
		for _, x := range xs {
			must(0, q.Add(x))
		}
		return []float64{must(q.Value(level))}
	},
	"bucket": func(t *testing.T, v vector) []float64 {
		var salt, unit string
		v.arg(t, 0, &salt)
		v.arg(t, 1, &unit)
		return []float64{float64(UnitHash(salt, unit)), float64(Bucket(salt, unit))}
	},
}

func ends(i Interval) []float64 { return []float64{i.Low, i.High} }

func (v vector) exposed(t *testing.T) (out []Exposed) {
	var weights []uint32
	var units []uint64
	v.arg(t, 0, &weights)
	v.arg(t, 1, &units)
	for i := range weights {
		out = append(out, Exposed{Name: string(rune('a' + i)), Weight: weights[i], Units: units[i]})
	}
	return out
}

// Every statistic on questions drawn at random, against the answers of scipy, statsmodels
// and plain definitions, to 1e-6 relative. The table says who answered what.
func TestVectors(t *testing.T) {
	asked := map[string]int{}
	for _, v := range readVectors(t) {
		f := answers[v.kind]
		if f == nil {
			t.Fatalf("nobody here answers %q", v.kind)
		}
		asked[v.kind]++
		got := f(t, v)
		if len(got) != len(v.want) {
			t.Fatalf("%s %s: %d answers, want %d", v.kind, v.args, len(got), len(v.want))
		}
		for i, want := range v.want {
			if math.Abs(got[i]-want) > 1e-6*math.Abs(want)+1e-14 {
				t.Errorf("%s %s: answer %d is %.12g, %s says %.12g", v.kind, v.args, i, got[i], v.source, want)
			}
		}
	}
	for kind := range answers {
		if asked[kind] < 5 {
			t.Errorf("%s is asked %d times only", kind, asked[kind])
		}
	}
}
