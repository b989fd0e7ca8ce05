package policy

import (
	"encoding/json"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/experiments"
)

// Limits of one policy. They keep a compiled policy within a few megabytes, keep the
// sum of endpoint weights of a version within the 32 bits xDS clients allow
// (MaxEndpoints · MaxWeight < 2^32), and keep retries from multiplying an outage.
const (
	MaxModels       = 4096
	MaxVersions     = 256 // per model
	MaxArms         = 256 // per model
	MaxRegions      = 1024
	MaxEndpoints    = 4096      // per version
	MaxPins         = 100       // per version
	MaxWeight       = 1_000_000 // per endpoint
	MaxAttempts     = 16
	MaxAccess       = 256         // per model
	MaxSettings     = 256         // per arm
	MaxDelay        = time.Minute // of Fault
	MaxSettingBytes = 64 << 10
	MaxGates        = 8              // per model
	MaxShadows      = 4              // of one model
	MaxTargetBytes  = 1024           // of Enrolment
	MaxDuration     = 24 * time.Hour // of Timeout, DeadMan and OpenFor
)

// Validate reports the first rule p breaks, as an error of kind Invalid that names the
// field, the value and the remedy. The rules:
//
//   - models are sorted by name, because Model searches; every name is unique in its
//     list; arm, version and region names follow outrigger.CheckName, model names may
//     also hold '/';
//   - no arm has one of the reserved names (Assigned);
//   - the ranges of a model's arms cover [0, experiments.Buckets) exactly once;
//   - arms and LastGood name existing versions; LastGood is never quarantined; a
//     quarantined version receives buckets only while a LastGood takes them over, and
//     DeadMan needs a LastGood;
//   - shadows name different versions that exist, are not quarantined and serve no arm;
//   - addresses are host:port and unique within a version; weights are 1 to MaxWeight;
//   - endpoints reached over TLS have a DNS name, their own or the version's server name;
//   - shares are parts of experiments.Buckets; a fault says what it does; headers of
//     Access are lower-case names of at most 64 letters, digits and '-';
//   - an enrolment that leaves anybody out names a version for them; its gates have
//     distinct salts and non-empty ranges;
//   - numbers stay within the limits of this package.
//
// Zero MaxRequests, MaxConnections, MaxPending, MaxRetries, ConsecutiveFailures, OpenFor and Timeout are valid and mean the
// defaults. Order within arms, versions, endpoints and regions is free; Normalise
// fixes it.
func (p *Policy) Validate() error {
	if err := limit("models", len(p.Models), MaxModels); err != nil {
		return err
	}
	for i := range p.Models {
		m := &p.Models[i]
		if i > 0 && p.Models[i-1].Name >= m.Name {
			return outrigger.Errorf(outrigger.Invalid, "model %q follows %q; models are unique and sorted by name, call Normalise", m.Name, p.Models[i-1].Name)
		}
		if err := m.Validate(); err != nil {
			return outrigger.Wrap(outrigger.Invalid, err, "model "+strconv.Quote(m.Name))
		}
	}
	return validateRegions(p.Regions)
}

// Validate reports the first rule one model breaks; see Policy.Validate.
func (m *Model) Validate() error {
	checks := []func() error{
		func() error { return CheckModelName(m.Name) },
		func() error { return outrigger.CheckName("salt", m.Salt) },
		m.validateUnit,
		func() error { return duration("dead_man", m.DeadMan) },
		m.validateVersions,
		m.validateLastGood,
		m.validateFault,
		m.validateAccess,
		m.validateEnrolment,
		m.ValidateSplit,
		m.validateShadows,
	}
	for _, check := range checks {
		if err := check(); err != nil {
			return err
		}
	}
	return nil
}

// ValidateSplit checks the part of a model that travels as routes: arms, ranges,
// timeout and attempts. Versions are only looked up.
func (m *Model) ValidateSplit() error {
	if err := duration("timeout", m.Timeout); err != nil {
		return err
	}
	if err := m.validateAttempts(); err != nil {
		return err
	}
	if err := m.validateArms(); err != nil {
		return err
	}
	return m.validateCover()
}

func (m *Model) validateShadows() error {
	if err := limit("shadows", len(m.Shadows), MaxShadows); err != nil {
		return err
	}
	seen := make(map[string]bool, len(m.Shadows))
	for _, s := range m.Shadows {
		v := m.Version(s.Version)
		switch {
		case v == nil || v.Quarantined:
			return outrigger.Errorf(outrigger.Invalid, "shadow %q is not a version that may be asked; list it in versions, not quarantined", s.Version)
		case seen[s.Version]:
			return outrigger.Errorf(outrigger.Invalid, "shadow %q appears twice", s.Version)
		case s.Share < 1 || s.Share > experiments.Buckets:
			return outrigger.Errorf(outrigger.Invalid, "shadow %q has share %d, allowed is 1..%d", s.Version, s.Share, experiments.Buckets)
		case slices.ContainsFunc(m.Arms, func(a Arm) bool { return a.Version == s.Version }):
			return outrigger.Errorf(outrigger.Invalid, "shadow %q serves an arm, too; a version is one or the other", s.Version)
		}
		seen[s.Version] = true
	}
	return nil
}

func (m *Model) validateUnit() error {
	switch m.Unit {
	case experiments.UnitUser, experiments.UnitSession, experiments.UnitRequest:
		return nil
	}
	return outrigger.Errorf(outrigger.Invalid, "unit %q is not one of user, session, request", string(m.Unit))
}

func (m *Model) validateAttempts() error {
	if m.MaxAttempts < 1 || m.MaxAttempts > MaxAttempts {
		return outrigger.Errorf(outrigger.Invalid, "max_attempts %d is outside 1..%d", m.MaxAttempts, MaxAttempts)
	}
	return nil
}

func (m *Model) validateVersions() error {
	if err := limit("versions", len(m.Versions), MaxVersions); err != nil {
		return err
	}
	seen := make(map[string]bool, len(m.Versions))
	for i := range m.Versions {
		v := &m.Versions[i]
		if err := unique("version", v.Name, seen); err != nil {
			return err
		}
		if err := v.validate(); err != nil {
			return outrigger.Wrap(outrigger.Invalid, err, "version "+strconv.Quote(v.Name))
		}
	}
	return nil
}

func (v *Version) validate() error {
	if v.Upstream != "" {
		if err := checkText("upstream", v.Upstream); err != nil {
			return err
		}
	}
	if err := duration("open_for", v.OpenFor); err != nil {
		return err
	}
	if err := share("shed", v.Shed); err != nil {
		return err
	}
	if err := limit("endpoints", len(v.Endpoints), MaxEndpoints); err != nil {
		return err
	}
	if err := v.validatePins(); err != nil {
		return err
	}
	if err := v.TLS.Validate(v.Endpoints); err != nil {
		return err
	}
	seen := make(map[string]bool, len(v.Endpoints))
	for _, e := range v.Endpoints {
		if _, _, err := SplitAddress(e.Address); err != nil {
			return err
		}
		if seen[e.Address] {
			return outrigger.Errorf(outrigger.Invalid, "endpoint %s appears twice; give each address once per version", e.Address)
		}
		seen[e.Address] = true
		if e.Weight < 1 || e.Weight > MaxWeight {
			return outrigger.Errorf(outrigger.Invalid, "endpoint %s has weight %d, allowed is 1..%d", e.Address, e.Weight, MaxWeight)
		}
		if e.Region != "" {
			if err := outrigger.CheckName("endpoint region", e.Region); err != nil {
				return err
			}
		}
	}
	return nil
}

func (v *Version) validatePins() error {
	if err := limit("pins", len(v.Pins), MaxPins); err != nil {
		return err
	}
	seen := make(map[string]bool, len(v.Pins))
	for _, p := range v.Pins {
		if _, err := outrigger.ParseKey(p); err != nil || strings.Count(p, "/") != 1 {
			return outrigger.Errorf(outrigger.Invalid, "pin %q is not SESSION/NAME of a variable", p)
		}
		if seen[p] {
			return outrigger.Errorf(outrigger.Invalid, "pin %s appears twice; give each variable once per version", p)
		}
		seen[p] = true
	}
	return nil
}

func (m *Model) validateLastGood() error {
	if m.LastGood == "" {
		if m.DeadMan > 0 {
			return outrigger.Errorf(outrigger.Invalid, "dead_man %v is set without a last_good version to return to", m.DeadMan)
		}
		return nil
	}
	v := m.Version(m.LastGood)
	if v == nil {
		return outrigger.Errorf(outrigger.Invalid, "last_good %q is not among the versions", m.LastGood)
	}
	if v.Quarantined {
		return outrigger.Errorf(outrigger.Invalid, "last_good %q is quarantined; choose another version", m.LastGood)
	}
	return nil
}

func (m *Model) validateFault() error {
	f := m.Fault
	if err := share("fault abort_share", f.AbortShare); err != nil {
		return err
	}
	if err := share("fault delay_share", f.DelayShare); err != nil {
		return err
	}
	if f.AbortShare > 0 && (f.AbortStatus < 200 || f.AbortStatus > 599) {
		return outrigger.Errorf(outrigger.Invalid, "fault abort_status %d is outside 200..599", f.AbortStatus)
	}
	if f.DelayShare > 0 && (f.Delay < time.Millisecond || f.Delay > MaxDelay) {
		return outrigger.Errorf(outrigger.Invalid, "fault delay %v is outside 1ms..%v", f.Delay, MaxDelay)
	}
	return nil
}

func (m *Model) validateAccess() error {
	if err := limit("access rules", len(m.Access), MaxAccess); err != nil {
		return err
	}
	for i, a := range m.Access {
		bad := func(r rune) bool { return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' }
		if a.Header == "" || len(a.Header) > 64 || strings.ContainsFunc(a.Header, bad) {
			return outrigger.Errorf(outrigger.Invalid, "access header %q is not 1..64 of a-z, 0-9 and '-'", a.Header)
		}
		if err := checkText("access value", a.Value); err != nil {
			return err
		}
		for _, b := range m.Access[:i] {
			if a == b {
				return outrigger.Errorf(outrigger.Invalid, "access %s %q appears twice; give each rule once", a.Header, a.Value)
			}
		}
	}
	return nil
}

func share(field string, n uint32) error {
	if n > experiments.Buckets {
		return outrigger.Errorf(outrigger.Invalid, "%s %d is outside 0..%d", field, n, experiments.Buckets)
	}
	return nil
}

func (m *Model) validateArms() error {
	if err := limit("arms", len(m.Arms), MaxArms); err != nil {
		return err
	}
	seen := make(map[string]bool, len(m.Arms))
	for _, a := range m.Arms {
		if err := unique("arm", a.Name, seen); err != nil {
			return err
		}
		if !Assigned(a.Name) {
			return outrigger.Errorf(outrigger.Invalid, "arm name %q is reserved for requests outside of the split; choose another", a.Name)
		}
		if err := a.validateSettings(); err != nil {
			return err
		}
		v := m.Version(a.Version)
		if v == nil {
			return outrigger.Errorf(outrigger.Invalid, "arm %q names version %q, which is not among the versions", a.Name, a.Version)
		}
		if v.Quarantined && len(a.Ranges) > 0 && m.LastGood == "" {
			return outrigger.Errorf(outrigger.Invalid, "arm %q sends buckets to quarantined version %q and there is no last_good; set one or move the buckets", a.Name, a.Version)
		}
	}
	return nil
}

func (a *Arm) validateSettings() error {
	if err := limit("settings of arm "+strconv.Quote(a.Name), len(a.Settings), MaxSettings); err != nil {
		return err
	}
	seen := make(map[string]bool, len(a.Settings))
	for _, s := range a.Settings {
		if err := unique("setting", s.Name, seen); err != nil {
			return err
		}
		if len(s.JSON) > MaxSettingBytes || !json.Valid([]byte(s.JSON)) {
			return outrigger.Errorf(outrigger.Invalid, "setting %q of arm %q has %d bytes; give JSON of at most %d", s.Name, a.Name, len(s.JSON), MaxSettingBytes)
		}
	}
	return nil
}

// validateCover checks that every bucket belongs to exactly one arm.
func (m *Model) validateCover() error {
	var owner [experiments.Buckets]uint16 // arm index + 1; MaxArms fits
	for i, a := range m.Arms {
		for _, r := range a.Ranges {
			if r.Start >= r.End || r.End > experiments.Buckets {
				return outrigger.Errorf(outrigger.Invalid, "arm %q has range [%d,%d); write 0 ≤ start < end ≤ %d", a.Name, r.Start, r.End, experiments.Buckets)
			}
			for b := r.Start; b < r.End; b++ {
				if o := owner[b]; o != 0 {
					return outrigger.Errorf(outrigger.Invalid, "bucket %d belongs to arm %q and arm %q; ranges must not overlap", b, m.Arms[o-1].Name, a.Name)
				}
				owner[b] = uint16(i + 1)
			}
		}
	}
	for b, o := range owner {
		if o == 0 {
			return outrigger.Errorf(outrigger.Invalid, "bucket %d belongs to no arm; the arms must cover 0..%d", b, experiments.Buckets-1)
		}
	}
	return nil
}

func validateRegions(rs []Region) error {
	if err := limit("regions", len(rs), MaxRegions); err != nil {
		return err
	}
	seen := make(map[string]bool, len(rs))
	for _, r := range rs {
		if err := unique("region", r.Name, seen); err != nil {
			return err
		}
		if r.Gateway != "" {
			if _, _, err := SplitAddress(r.Gateway); err != nil {
				return outrigger.Wrap(outrigger.Invalid, err, "region "+strconv.Quote(r.Name)+" gateway")
			}
		}
		// The negated form also refuses NaN.
		if !(r.Latitude >= -90 && r.Latitude <= 90) {
			return outrigger.Errorf(outrigger.Invalid, "region %q has latitude %v, allowed is -90..90 degrees", r.Name, r.Latitude)
		}
		if !(r.Longitude >= -180 && r.Longitude <= 180) {
			return outrigger.Errorf(outrigger.Invalid, "region %q has longitude %v, allowed is -180..180 degrees", r.Name, r.Longitude)
		}
	}
	return nil
}

// SplitAddress splits "host:port" or "[v6]:port"; the port is 1..65535. It needs no
// network. Errors have kind Invalid.
func SplitAddress(s string) (host string, port uint32, err error) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return "", 0, outrigger.Errorf(outrigger.Invalid, "address %q has no port; write host:port", s)
	}
	host = s[:i]
	if strings.HasPrefix(host, "[") && strings.HasSuffix(host, "]") {
		host = host[1 : len(host)-1]
		if !strings.Contains(host, ":") {
			return "", 0, outrigger.Errorf(outrigger.Invalid, "address %q has brackets around something that is not IPv6", s)
		}
	} else if strings.Contains(host, ":") {
		return "", 0, outrigger.Errorf(outrigger.Invalid, "address %q has several colons; write [v6]:port for IPv6", s)
	}
	if len(host) > outrigger.MaxNameBytes-1 || strings.ContainsAny(host, "[]/ ") {
		return "", 0, outrigger.Errorf(outrigger.Invalid, "address %q has no usable host", s)
	}
	if cerr := checkText("host", host); cerr != nil {
		return "", 0, cerr
	}
	n, perr := strconv.ParseUint(s[i+1:], 10, 16)
	if perr != nil || n == 0 || s[i+1] < '1' || s[i+1] > '9' {
		return "", 0, outrigger.Errorf(outrigger.Invalid, "address %q has port %q, allowed is 1..65535", s, s[i+1:])
	}
	return host, uint32(n), nil
}

// JoinAddress is the inverse of SplitAddress.
func JoinAddress(host string, port uint32) string {
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	return host + ":" + strconv.FormatUint(uint64(port), 10)
}

// CheckModelName is what a logical model name must be: outrigger.CheckName's rules, but '/'
// is allowed, because published models have it in their names ("organisation/model") and
// applications ask for them by that name. Errors have kind Invalid.
func CheckModelName(s string) error { return checkText("name", s) }

// checkText is CheckName without the rule against '/'.
func checkText(field, s string) error {
	switch {
	case s == "" || len(s) > outrigger.MaxNameBytes:
		return outrigger.Errorf(outrigger.Invalid, "%s %q is %d bytes long, allowed is 1..%d", field, s, len(s), outrigger.MaxNameBytes)
	case !utf8.ValidString(s):
		return outrigger.Errorf(outrigger.Invalid, "%s %q is not valid UTF-8", field, s)
	case strings.ContainsFunc(s, func(r rune) bool { return r < 0x20 || r == 0x7f }):
		return outrigger.Errorf(outrigger.Invalid, "%s %q contains a control character", field, s)
	}
	return nil
}

func unique(field, name string, seen map[string]bool) error {
	if err := outrigger.CheckName(field, name); err != nil {
		return err
	}
	if seen[name] {
		return outrigger.Errorf(outrigger.Invalid, "%s %q appears twice; names are unique", field, name)
	}
	seen[name] = true
	return nil
}

func limit(field string, n, most int) error {
	if n > most {
		return outrigger.Errorf(outrigger.Invalid, "%d %s, the limit is %d", n, field, most)
	}
	return nil
}

func duration(field string, d time.Duration) error {
	if d < 0 || d > MaxDuration {
		return outrigger.Errorf(outrigger.Invalid, "%s %v is outside 0..%v", field, d, MaxDuration)
	}
	return nil
}
