//go:build !dataplane

package main

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// container is what a test wants of a pod's container.
type container struct {
	Name         string
	Image        string
	Args         []string
	VolumeMounts []struct{ Name string } `yaml:"volumeMounts"`
}

type manifest struct {
	Kind string
	Spec struct {
		Template struct {
			Spec struct {
				InitContainers []container `yaml:"initContainers"`
				Containers     []container
				Volumes        []struct{ Name string }
			}
		}
		VolumeClaimTemplates []struct{ Metadata struct{ Name string } } `yaml:"volumeClaimTemplates"`
	}
}

// The manifests under deploy/kubernetes name verbs and flags that exist, with values they take,
// and mount what they declare.
func TestKubernetesManifests(t *testing.T) {
	files, err := filepath.Glob(filepath.Join("..", "..", "deploy", "kubernetes", "*.yaml"))
	must(t, err)
	verbs := map[string]int{}
	for _, file := range files {
		f, err := os.Open(file)
		must(t, err)
		defer f.Close()
		for d := yaml.NewDecoder(f); ; {
			var m manifest
			if err := d.Decode(&m); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			pod := m.Spec.Template.Spec
			declared := map[string]bool{}
			for _, v := range pod.Volumes {
				declared[v.Name] = true
			}
			for _, v := range m.Spec.VolumeClaimTemplates {
				declared[v.Metadata.Name] = true
			}
			for _, c := range append(pod.InitContainers, pod.Containers...) {
				for _, v := range c.VolumeMounts {
					if !declared[v.Name] {
						t.Errorf("%s: %s mounts %q, which is not declared", file, c.Name, v.Name)
					}
				}
				lean := strings.HasPrefix(c.Image, "outrigger-dataplane:")
				if lean && !slices.Contains([]string{"sidecar", "node", "init"}, c.Args[0]) {
					t.Errorf("%s: %s runs %q, which outrigger-dataplane does not have", file, c.Name, c.Args[0])
				}
				if lean || strings.HasPrefix(c.Image, "outrigger:") {
					verbs[c.Args[0]]++
					parses(t, file, c.Args)
				}
			}
		}
	}
	if verbs["control"] != 2 || verbs["node"] != 1 || verbs["sidecar"] != 1 || verbs["init"] != 1 {
		t.Errorf("the manifests run %v", verbs)
	}
}

// parses checks a command line as far as that goes without starting anything.
func parses(t *testing.T, file string, args []string) {
	t.Helper()
	cmd, rest, err := (Main{}).command().Find(args)
	if err != nil || cmd.Name() != args[0] {
		t.Errorf("%s: %v: %v", file, args, err)
		return
	}
	if err := cmd.ParseFlags(rest); err != nil {
		t.Errorf("%s: %s: %v", file, args[0], err)
	}
	if left := cmd.Flags().Args(); len(left) != 0 {
		t.Errorf("%s: %s takes no %v", file, args[0], left)
	}
}
