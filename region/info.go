package region

import (
	"strings"

	"github.com/outrigger-mesh/outrigger"
)

// Info is one region as a directory (Consul, a file) knows it.
type Info struct {
	Name     string
	Gateway  string // host:port of its gRPC gateway
	Location Location
	Healthy  bool // as the directory says; probes decide later
}

// Validate checks one entry; errors have kind Invalid and name the field.
func (i Info) Validate() error {
	if err := outrigger.CheckName("region", i.Name); err != nil {
		return err
	}
	if host, port, ok := cutLast(i.Gateway, ":"); !ok || host == "" || port == "" {
		return outrigger.Errorf(outrigger.Invalid, "region %s: gateway %q is not host:port", i.Name, i.Gateway)
	}
	if i.Location != (Location{}) && !i.Location.Known() {
		return outrigger.Errorf(outrigger.Invalid, "region %s: location %v,%v is not on Earth; latitude is within ±90, longitude within ±180",
			i.Name, i.Location.Latitude, i.Location.Longitude)
	}
	return nil
}

// cutLast cuts s around the last sep, so that IPv6 hosts keep their colons.
func cutLast(s, sep string) (before, after string, found bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}
