package experiments

// Moments is the mergeable summary of several quantities observed together, such as the
// counts of one report: N observations, each with as many values. From it comes the
// summary of any two linear combinations of them (Project), also one that is only chosen
// afterwards, as a price is. Squares are kept as deviations from the means.
//
// The zero value is empty and takes the number of quantities of what is added first.
// Merge is commutative and associative up to rounding.
type Moments struct {
	N   uint64
	Sum []float64
	dev []float64 // upper triangle by rows: Σ(v_i−v̄_i)(v_j−v̄_j), j ≥ i
}

// MaxQuantities bounds the quantities of one Moments.
const MaxQuantities = 32

// Add adds one observation. The error has kind Invalid (no quantities or too many, another
// number of them than before, a value that is not finite or beyond ±1e60), and the
// summary is then unchanged. values is not kept.
func (m *Moments) Add(values []float64) error {
	if len(values) == 0 || len(values) > MaxQuantities || m.N > 0 && len(values) != len(m.Sum) {
		return invalid("an observation has %d quantities; there are %d, and at most %d are taken", len(values), len(m.Sum), MaxQuantities)
	}
	for _, v := range values {
		if !storable(v) {
			return invalid("an observation has the value %v; values are finite and within ±%g", v, float64(maxMagnitude))
		}
	}
	m.merge(1, values, nil)
	return nil
}

// Merge adds the observations of o, which must be others and have as many quantities; if
// they do not the error has kind Invalid and nothing changes. o is not modified.
func (m *Moments) Merge(o *Moments) error {
	switch {
	case o == nil || o.N == 0:
		return nil
	case m.N > 0 && len(o.Sum) != len(m.Sum):
		return invalid("moments of %d quantities cannot be merged with those of %d", len(m.Sum), len(o.Sum))
	}
	m.merge(o.N, o.Sum, o.dev)
	return nil
}

// merge is Chan, Golub and LeVeque's update; dev is nil for a single observation.
func (m *Moments) merge(count uint64, sum, dev []float64) {
	k := len(sum)
	if m.N == 0 {
		m.Sum, m.dev = make([]float64, k), make([]float64, k*(k+1)/2)
	}
	n, o := float64(m.N), float64(count)
	w := n * o / (n + o)
	var d [MaxQuantities]float64
	for i := range k {
		if m.N > 0 {
			d[i] = sum[i]/o - m.Sum[i]/n
		}
	}
	at := 0
	for i := range k {
		for j := i; j < k; j++ {
			m.dev[at] += w * d[i] * d[j]
			if dev != nil {
				m.dev[at] += dev[at]
			}
			at++
		}
	}
	for i := range k {
		m.Sum[i] += sum[i]
	}
	m.N += count
}

// Project is the summary of the combinations x = Σ a_i·v_i and y = Σ b_i·v_i. The error
// has kind Invalid if a or b has another length than there are quantities, or what comes
// out is not finite.
func (m *Moments) Project(a, b []float64) (Sums, error) {
	if m.N == 0 {
		return Sums{}, nil
	}
	if len(a) != len(m.Sum) || len(b) != len(m.Sum) {
		return Sums{}, invalid("combinations of %d and %d quantities; there are %d", len(a), len(b), len(m.Sum))
	}
	s, at := Sums{N: m.N}, 0
	for i := range m.Sum {
		s.SumX, s.SumY = s.SumX+a[i]*m.Sum[i], s.SumY+b[i]*m.Sum[i]
		for j := i; j < len(m.Sum); j++ {
			d := m.dev[at]
			at++
			if i == j {
				s.DevXX, s.DevYY, s.DevXY = s.DevXX+a[i]*a[i]*d, s.DevYY+b[i]*b[i]*d, s.DevXY+a[i]*b[i]*d
				continue
			}
			s.DevXX, s.DevYY, s.DevXY = s.DevXX+2*a[i]*a[j]*d, s.DevYY+2*b[i]*b[j]*d, s.DevXY+(a[i]*b[j]+a[j]*b[i])*d
		}
	}
	s.DevXX, s.DevYY = max(s.DevXX, 0), max(s.DevYY, 0) // differences of large squares round below 0
	return s, s.Check()
}
