// Package config fills command-line flags from one configuration file and from the
// environment, so that the flags are the whole schema.
//
// Precedence, strongest first: flag on the command line, environment variable
// OUTRIGGER_<SECTION>_<FLAG> (upper case, '-' as '_'), file entry <section>.<flag>,
// the flag's default. The file is YAML with one mapping per section:
//
//	control:
//	  listen: 127.0.0.1:7400
//	sidecar:
//	  fallback: [10.0.0.1:7400, 10.0.0.2:7400]
//
// Unknown sections, unknown keys, values a flag refuses and environment variables
// that match no flag of the section are errors that name file, line and key: a
// misspelt setting never passes silently.
package config

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"

	"github.com/outrigger-mesh/outrigger"
)

// MaxFileBytes bounds a configuration file.
const MaxFileBytes = 1 << 20

// Source is where settings come from.
type Source struct {
	Path     string   // file; "" = none
	Environ  []string // "KEY=value" pairs, as os.Environ returns them
	Sections []string // every section the product knows; others are refused
}

// Apply sets every flag of fs that was not given on the command line. Errors have
// kind Invalid.
func (s Source) Apply(fs *pflag.FlagSet, section string) error {
	file, err := s.load()
	if err != nil {
		return err
	}
	if err := s.applyFile(fs, section, file); err != nil {
		return err
	}
	return s.applyEnv(fs, section)
}

type entry struct {
	line  int
	value *yaml.Node
}

// load returns section → key → entry.
func (s Source) load() (map[string]map[string]entry, error) {
	if s.Path == "" {
		return nil, nil
	}
	raw, err := os.ReadFile(s.Path)
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Invalid, err, "config file")
	}
	if len(raw) > MaxFileBytes {
		return nil, outrigger.Errorf(outrigger.Invalid, "config file %s is %d bytes, the limit is %d", s.Path, len(raw), MaxFileBytes)
	}
	return parse(s.Path, raw, s.Sections)
}

func parse(path string, raw []byte, known []string) (map[string]map[string]entry, error) {
	var doc yaml.Node
	if err := yaml.Unmarshal(raw, &doc); err != nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "%s: %v", path, err)
	}
	if len(doc.Content) == 0 {
		return nil, nil
	}
	top := doc.Content[0]
	if top.Kind != yaml.MappingNode {
		return nil, outrigger.Errorf(outrigger.Invalid, "%s:%d: the file must map sections to settings", path, top.Line)
	}
	out := map[string]map[string]entry{}
	for i := 0; i+1 < len(top.Content); i += 2 {
		name, body := top.Content[i], top.Content[i+1]
		if !slices.Contains(known, name.Value) {
			return nil, outrigger.Errorf(outrigger.Invalid, "%s:%d: unknown section %q; known: %s", path, name.Line, name.Value, strings.Join(known, ", "))
		}
		if _, twice := out[name.Value]; twice {
			return nil, outrigger.Errorf(outrigger.Invalid, "%s:%d: section %q appears twice", path, name.Line, name.Value)
		}
		if body.Kind != yaml.MappingNode {
			return nil, outrigger.Errorf(outrigger.Invalid, "%s:%d: section %q must be a mapping", path, body.Line, name.Value)
		}
		out[name.Value] = map[string]entry{}
		for j := 0; j+1 < len(body.Content); j += 2 {
			k := body.Content[j]
			if _, twice := out[name.Value][k.Value]; twice {
				return nil, outrigger.Errorf(outrigger.Invalid, "%s:%d: %s.%s appears twice", path, k.Line, name.Value, k.Value)
			}
			out[name.Value][k.Value] = entry{line: k.Line, value: body.Content[j+1]}
		}
	}
	return out, nil
}

func (s Source) applyFile(fs *pflag.FlagSet, section string, file map[string]map[string]entry) error {
	for key, e := range file[section] {
		f := fs.Lookup(key)
		if f == nil {
			return outrigger.Errorf(outrigger.Invalid, "%s:%d: unknown setting %s.%s; see `outrigger %s --help`", s.Path, e.line, section, key, section)
		}
		text, err := flatten(e.value)
		if err != nil {
			return outrigger.Errorf(outrigger.Invalid, "%s:%d: %s.%s: %v", s.Path, e.line, section, key, err)
		}
		if f.Changed {
			continue
		}
		if err := fs.Set(key, text); err != nil {
			return outrigger.Errorf(outrigger.Invalid, "%s:%d: %s.%s: %v", s.Path, e.line, section, key, err)
		}
		f.Changed = false // the environment still wins over the file
	}
	return nil
}

// flatten turns a scalar, a list or a map of scalars into the text a flag parses.
func flatten(n *yaml.Node) (string, error) {
	switch n.Kind {
	case yaml.ScalarNode:
		return n.Value, nil
	case yaml.SequenceNode:
		var parts []string
		for _, c := range n.Content {
			if c.Kind != yaml.ScalarNode || strings.ContainsAny(c.Value, ",\n") {
				return "", fmt.Errorf("line %d: list items must be plain values without commas", c.Line)
			}
			parts = append(parts, c.Value)
		}
		return strings.Join(parts, ","), nil
	case yaml.MappingNode:
		var parts []string
		for i := 0; i+1 < len(n.Content); i += 2 {
			if v := n.Content[i+1]; v.Kind != yaml.ScalarNode || strings.ContainsAny(v.Value, ",\n") {
				return "", fmt.Errorf("line %d: map values must be plain values without commas", v.Line)
			}
			parts = append(parts, n.Content[i].Value+"="+n.Content[i+1].Value)
		}
		return strings.Join(parts, ","), nil
	}
	return "", fmt.Errorf("line %d: write a value, a list or a map", n.Line)
}

func (s Source) applyEnv(fs *pflag.FlagSet, section string) error {
	prefix := "OUTRIGGER_" + envName(section) + "_"
	byEnv := map[string]*pflag.Flag{}
	fs.VisitAll(func(f *pflag.Flag) { byEnv[prefix+envName(f.Name)] = f })
	for _, kv := range s.Environ {
		k, v, _ := strings.Cut(kv, "=")
		if !strings.HasPrefix(k, prefix) {
			continue
		}
		f := byEnv[k]
		if f == nil {
			return outrigger.Errorf(outrigger.Invalid, "environment variable %s matches no setting of %s; see `outrigger %s --help`", k, section, section)
		}
		if f.Changed {
			continue
		}
		if err := fs.Set(f.Name, v); err != nil {
			return outrigger.Errorf(outrigger.Invalid, "environment variable %s: %v", k, err)
		}
	}
	return nil
}

func envName(s string) string { return strings.ToUpper(strings.ReplaceAll(s, "-", "_")) }
