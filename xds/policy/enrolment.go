package policy

import (
	"unicode/utf8"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/experiments"
)

// validateEnrolment checks all but the target's meaning, which whoever compiles it finds.
func (m *Model) validateEnrolment() error {
	e := &m.Enrolment
	if !e.Limited() {
		if e.Version != "" {
			return outrigger.Errorf(outrigger.Invalid, "enrolment version %q is set, but everybody takes part; give a target or gates", e.Version)
		}
		return nil
	}
	if len(e.Target) > MaxTargetBytes || !utf8.ValidString(e.Target) {
		return outrigger.Errorf(outrigger.Invalid, "enrolment target is %d bytes long or not UTF-8; the limit is %d bytes", len(e.Target), MaxTargetBytes)
	}
	v := m.Version(e.Version)
	if v == nil {
		return outrigger.Errorf(outrigger.Invalid, "enrolment version %q is not among the versions; units that take no part need one", e.Version)
	}
	if v.Quarantined && m.LastGood == "" {
		return outrigger.Errorf(outrigger.Invalid, "enrolment version %q is quarantined and there is no last_good; choose another version", e.Version)
	}
	if err := limit("enrolment gates", len(e.Gates), MaxGates); err != nil {
		return err
	}
	for i, g := range e.Gates {
		if err := outrigger.CheckName("enrolment salt", g.Salt); err != nil {
			return err
		}
		if g.Salt == m.Salt {
			return outrigger.Errorf(outrigger.Invalid, "enrolment salt %q is that of the arms; who takes part must say nothing about the arm", g.Salt)
		}
		if g.Start >= g.End || g.End > experiments.Buckets {
			return outrigger.Errorf(outrigger.Invalid, "enrolment gate %q has range [%d,%d); write 0 ≤ start < end ≤ %d", g.Salt, g.Start, g.End, experiments.Buckets)
		}
		for _, o := range e.Gates[:i] {
			if o.Salt == g.Salt {
				return outrigger.Errorf(outrigger.Invalid, "enrolment salt %q appears twice; give each gate once", g.Salt)
			}
		}
	}
	return nil
}
