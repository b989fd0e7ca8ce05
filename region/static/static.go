// Package static reads the regions of a mesh from a file, for deployments without
// Consul. The file is YAML:
//
//	regions:
//	  - name: eu
//	    gateway: 10.0.0.1:7400
//	    latitude: 53.35
//	    longitude: -6.26
//
// It is read once per call; unknown keys, duplicates and bad values are refused with
// the file's name, and nothing is half-applied.
package static

import (
	"bytes"
	"os"

	"go.yaml.in/yaml/v3"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/region"
)

// MaxRegions bounds a file.
const MaxRegions = 256

// Load reads and validates a file. Errors have kind Invalid.
func Load(path string) ([]region.Info, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Invalid, err, "regions file")
	}
	out, err := parse(raw)
	return out, outrigger.Wrap(outrigger.Invalid, err, "regions file "+path)
}

func parse(raw []byte) ([]region.Info, error) {
	var doc struct {
		Regions []struct {
			Name      string  `yaml:"name"`
			Gateway   string  `yaml:"gateway"`
			Latitude  float64 `yaml:"latitude"`
			Longitude float64 `yaml:"longitude"`
		} `yaml:"regions"`
	}
	dec := yaml.NewDecoder(bytes.NewReader(raw))
	dec.KnownFields(true)
	if err := dec.Decode(&doc); err != nil {
		return nil, err
	}
	if len(doc.Regions) == 0 || len(doc.Regions) > MaxRegions {
		return nil, outrigger.Errorf(outrigger.Invalid, "it lists %d regions; give 1 to %d", len(doc.Regions), MaxRegions)
	}
	seen := map[string]bool{}
	var out []region.Info
	for _, r := range doc.Regions {
		i := region.Info{Name: r.Name, Gateway: r.Gateway, Healthy: true,
			Location: region.Location{Latitude: r.Latitude, Longitude: r.Longitude}}
		if err := i.Validate(); err != nil {
			return nil, err
		}
		if seen[i.Name] {
			return nil, outrigger.Errorf(outrigger.Invalid, "region %s is listed twice", i.Name)
		}
		seen[i.Name] = true
		out = append(out, i)
	}
	return out, nil
}
