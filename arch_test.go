package outrigger_test

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// The house rules as tests. Each check is a pure function from parsed sources to
// findings, so TestRulesCanFail can plant one offence per rule and demand that it is
// found; TestHouse runs the same functions over the tree.

const module = "github.com/outrigger-mesh/outrigger"

// source is one parsed Go file. dir is its slash-separated folder, "." at the root.
type source struct {
	dir, name string
	file      *ast.File
	fset      *token.FileSet
	text      []byte
}

func (s source) test() bool      { return strings.HasSuffix(s.name, "_test.go") }
func (s source) generated() bool { return ast.IsGenerated(s.file) }
func (s source) path() string    { return path.Join(s.dir, s.name) }

func (s source) at(pos token.Pos) string {
	return fmt.Sprintf("%s:%d", s.path(), s.fset.Position(pos).Line)
}

// imports returns the import paths of the file.
func (s source) imports() []string {
	var out []string
	for _, i := range s.file.Imports {
		p, err := strconv.Unquote(i.Path.Value)
		if err == nil {
			out = append(out, p)
		}
	}
	return out
}

// topLevel is the fixed set of names at the root of the repository.
var topLevel = []string{"proxy", "xds", "control", "cache", "region", "experiments", "deploy", "bench",
	"api", "cmd", "internal", "go.mod", "go.sum", "Makefile", "README.md", "ARCHITECTURE.md", "LICENSE",
	".ci", ".git", ".gitignore", ".cache", "bin",
	"outrigger.go", "errors.go", "value.go", "constraint.go",
	"arch_test.go", "outrigger_test.go", "value_test.go"}

// pure packages decide; they do no I/O, keep no time and start nothing.
var pure = []string{"cache/version", "cache/coherence", "xds/policy", "region", "experiments",
	"experiments/algorithms", "deploy", "deploy/models", "deploy/alerting", "internal/expr"}

var bannedInPure = []string{"net", "net/http", "os", "io/fs", "sync", "sync/atomic", "math/rand", "syscall", "time/tzdata"}

// doors: only the listed folders (and their test files) may import a dependency.
var doors = []struct {
	prefix string
	only   []string
}{
	{"cel.dev/cel-go", []string{"internal/expr"}},
	{"github.com/KimMachineGun/automemlimit", []string{"internal/heap"}},
	{"github.com/hashicorp/consul/api", []string{"region/consul"}},
	{"github.com/hashicorp/golang-lru/v2", []string{"cache/tier"}},
	{"github.com/hashicorp/golang-lru/arc", []string{"cache/tier"}},
	{"github.com/sony/gobreaker/v2", []string{"proxy/inference"}},
	{"github.com/envoyproxy/go-control-plane/pkg", []string{"xds/adsserver"}},
	{"github.com/envoyproxy/go-control-plane/envoy", []string{"xds/translate", "xds/adsserver", "xds/adsclient", "xds/relay", "xds/internal"}},
	{"github.com/cockroachdb/pebble", []string{"control/eventlog/pebble"}},
	{"go.opentelemetry.io/otel/sdk", []string{"internal/telemetry"}},
	{"go.opentelemetry.io/otel/exporters", []string{"internal/telemetry"}},
	{"go.opentelemetry.io/proto/otlp", []string{"control/otlp", "control"}},
	{"crypto/tls", []string{"internal/identity"}},
	{"crypto/x509", []string{"internal/identity"}},
	{"github.com/charmbracelet/bubbletea", []string{"cmd/outrigger"}},
	{"gocloud.dev", []string{"control/artifacts"}},
	{"github.com/aws", []string{"control/artifacts"}},
	{"github.com/spf13/cobra", []string{"cmd/outrigger"}},
	{"github.com/openai/openai-go/v3", []string{"cmd/outrigger"}},
	{"github.com/google/nftables", []string{"proxy/intercept/netfilter"}},
	{"github.com/vishvananda", []string{"proxy/intercept/netfilter", "internal/netnstest"}},
}

// within reports whether dir is root or below it.
func within(dir, root string) bool { return dir == root || strings.HasPrefix(dir, root+"/") }

// forbiddenImport explains why dir may not import the module folder target, or "".
func forbiddenImport(dir, target string) string {
	assembly := func(d string) bool {
		return d == "cmd/outrigger" || within(d, "bench") || within(d, "internal/meshtest")
	}
	switch {
	case target == "." || within(target, "api"):
		return ""
	case within(dir, "api"):
		return "api imports only generated code"
	case dir == ".":
		return "the root vocabulary imports the standard library only"
	case target == "bench/trace" && assembly(dir):
		return "" // data, which the demonstration replays
	case within(target, "cmd") || within(target, "bench") || within(target, "internal/meshtest"):
		return "nothing imports cmd, bench or internal/meshtest"
	case within(dir, "proxy") && within(target, "control"), within(dir, "control") && within(target, "proxy"):
		return "proxy and control never import each other"
	case within(target, "proxy") && !within(dir, "proxy") && !assembly(dir),
		within(target, "control") && !within(dir, "control") && !assembly(dir):
		return "only cmd, bench and internal/meshtest assemble proxy and control"
	}
	for _, parent := range []string{"proxy", "control", "cache"} {
		if target == parent && within(dir, parent) && dir != parent {
			return "children of " + parent + " never import their parent"
		}
	}
	if slices.Contains(pure, dir) && !pureTarget(dir, target) {
		return "a pure package imports only pure packages, the root and api"
	}
	if within(dir, "internal") && !within(target, "internal") && !assembly(dir) {
		return "internal packages stand below everything but the root and api"
	}
	lower := within(dir, "cache") || within(dir, "xds") || within(dir, "region") || within(dir, "experiments") || within(dir, "deploy")
	if lower && within(target, "cache") && !within(dir, "cache") {
		return "only proxy, cmd and bench sit above cache"
	}
	return ""
}

func pureTarget(dir, target string) bool {
	if dir == "xds/policy" && slices.Contains([]string{"experiments", "region", "deploy"}, target) {
		return true
	}
	if dir == "deploy" && slices.Contains([]string{"experiments", "internal/expr"}, target) {
		return true
	}
	if dir == "deploy/alerting" && slices.Contains([]string{"deploy", "experiments", "internal/expr"}, target) {
		return true
	}
	if dir == "experiments/algorithms" && target == "experiments" {
		return true
	}
	return dir == "cache/coherence" && target == "cache/version"
}

func checkImports(files []source) (found []string) {
	for _, f := range files {
		if f.test() {
			continue // tests may reach for real peers
		}
		for _, imp := range f.imports() {
			if target, ok := strings.CutPrefix(imp, module); ok {
				target = strings.TrimPrefix(target, "/")
				if target == "" {
					target = "."
				}
				if why := forbiddenImport(f.dir, target); why != "" {
					found = append(found, fmt.Sprintf("%s imports %s: %s", f.path(), target, why))
				}
				continue
			}
			if slices.Contains(pure, f.dir) && slices.Contains(bannedInPure, imp) {
				found = append(found, fmt.Sprintf("%s imports %s: pure packages do no I/O, randomness or locking", f.path(), imp))
			}
			for _, d := range doors {
				if within(imp, d.prefix) && !slices.ContainsFunc(d.only, func(o string) bool { return within(f.dir, o) }) {
					found = append(found, fmt.Sprintf("%s imports %s: its door is %s", f.path(), imp, strings.Join(d.only, ", ")))
				}
			}
		}
	}
	return found
}

func checkPurity(files []source) (found []string) {
	for _, f := range files {
		if f.test() || !slices.Contains(pure, f.dir) {
			continue
		}
		ast.Inspect(f.file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.GoStmt:
				found = append(found, f.at(n.Pos())+": go statement in a pure package")
			case *ast.SelectorExpr:
				if isCall(n, "time", "Now") || isCall(n, "time", "Since") || isCall(n, "time", "After") {
					found = append(found, f.at(n.Pos())+": a pure package reads the clock; pass now in")
				}
			}
			return true
		})
	}
	return found
}

// checkDocs wants exactly one package comment per package, starting "Package x" (or
// "Command x"), and a comment on every exported top-level declaration.
func checkDocs(files []source) (found []string) {
	comments := map[string][]string{}
	for _, f := range files {
		if f.test() || f.generated() {
			continue
		}
		if _, ok := comments[f.dir]; !ok {
			comments[f.dir] = nil
		}
		if f.file.Doc != nil {
			comments[f.dir] = append(comments[f.dir], f.file.Doc.Text())
		}
		for _, d := range f.file.Decls {
			found = append(found, undocumented(f, d)...)
		}
	}
	for dir, docs := range comments {
		switch {
		case len(docs) != 1:
			found = append(found, fmt.Sprintf("%s has %d package comments, want exactly one", dir, len(docs)))
		case !strings.HasPrefix(docs[0], "Package ") && !strings.HasPrefix(docs[0], "Command "):
			found = append(found, dir+": the package comment does not start with Package or Command")
		}
	}
	slices.Sort(found)
	return found
}

func undocumented(f source, d ast.Decl) (found []string) {
	miss := func(name *ast.Ident) {
		found = append(found, f.at(name.Pos())+": exported "+name.Name+" has no comment")
	}
	switch d := d.(type) {
	case *ast.FuncDecl:
		if d.Name.IsExported() && d.Doc == nil && exportedReceiver(d) {
			miss(d.Name)
		}
	case *ast.GenDecl:
		for _, s := range d.Specs {
			switch s := s.(type) {
			case *ast.TypeSpec:
				if s.Name.IsExported() && d.Doc == nil && s.Doc == nil && s.Comment == nil {
					miss(s.Name)
				}
			case *ast.ValueSpec:
				if s.Names[0].IsExported() && d.Doc == nil && s.Doc == nil && s.Comment == nil {
					miss(s.Names[0])
				}
			}
		}
	}
	return found
}

func exportedReceiver(d *ast.FuncDecl) bool {
	if d.Recv == nil {
		return true
	}
	t := d.Recv.List[0].Type
	for {
		switch x := t.(type) {
		case *ast.StarExpr:
			t = x.X
		case *ast.IndexExpr:
			t = x.X
		case *ast.IndexListExpr:
			t = x.X
		case *ast.Ident:
			return x.IsExported()
		default:
			return false
		}
	}
}

// checkBanned refuses calls that make tests slow or flaky and production leak.
func checkBanned(files []source) (found []string) {
	for _, f := range files {
		bubbled := usesSynctest(f)
		ast.Inspect(f.file, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			switch {
			case f.test() && isCall(sel, "time", "Sleep") && !bubbled:
				found = append(found, f.at(sel.Pos())+": time.Sleep in a test outside a synctest bubble; wait for the event instead")
			case !f.test() && isCall(sel, "time", "Sleep"):
				found = append(found, f.at(sel.Pos())+": time.Sleep in production; wait on a timer and the context")
			case !f.test() && isCall(sel, "time", "After"):
				found = append(found, f.at(sel.Pos())+": time.After leaks its timer until it fires; use time.NewTimer")
			case !f.test() && f.dir != "cmd/outrigger" && isCall(sel, "os", "Exit"):
				found = append(found, f.at(sel.Pos())+": only cmd decides to exit")
			}
			return true
		})
		for _, d := range f.file.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == "init" && !f.generated() {
				found = append(found, f.at(fn.Pos())+": init function; wire in cmd instead")
			}
		}
	}
	return found
}

// usesSynctest reports whether the file imports testing/synctest; in such files a
// Sleep advances the bubble's clock and costs nothing.
func usesSynctest(f source) bool { return slices.Contains(f.imports(), "testing/synctest") }

func isCall(sel *ast.SelectorExpr, pkg, name string) bool {
	id, ok := sel.X.(*ast.Ident)
	return ok && id.Name == pkg && id.Obj == nil && sel.Sel.Name == name
}

// checkLength keeps files readable.
func checkLength(files []source) (found []string) {
	const limit = 600
	for _, f := range files {
		if f.test() || f.generated() {
			continue
		}
		if n := bytes.Count(f.text, []byte("\n")); n > limit {
			found = append(found, fmt.Sprintf("%s has %d lines, the limit is %d; split it by idea", f.path(), n, limit))
		}
	}
	return found
}

func parseTree(t *testing.T) []source {
	t.Helper()
	var out []source
	fset := token.NewFileSet()
	err := filepath.WalkDir(".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name := d.Name(); p != "." && (strings.HasPrefix(name, ".") || name == "testdata" || name == "bin" || name == "node_modules") {
				return filepath.SkipDir
			}
			if _, err := os.Stat(filepath.Join(p, "go.mod")); err == nil && p != "." {
				return filepath.SkipDir // another module, e.g. benchmark peers
			}
			return nil
		}
		if !strings.HasSuffix(p, ".go") {
			return nil
		}
		text, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		s, err := parseOne(fset, filepath.ToSlash(p), text)
		if err != nil {
			return err
		}
		out = append(out, s)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func parseOne(fset *token.FileSet, p string, text []byte) (source, error) {
	f, err := parser.ParseFile(fset, p, text, parser.ParseComments)
	return source{dir: path.Dir(p), name: path.Base(p), file: f, fset: fset, text: text}, err
}

var rules = []struct {
	name  string
	check func([]source) []string
}{
	{"imports", checkImports}, {"purity", checkPurity}, {"docs", checkDocs}, {"banned", checkBanned}, {"length", checkLength},
}

// TestHouse runs every rule over the tree.
func TestHouse(t *testing.T) {
	files := parseTree(t)
	if len(files) < 30 {
		t.Fatalf("only %d Go files found; is the walk broken?", len(files))
	}
	for _, r := range rules {
		t.Run(r.name, func(t *testing.T) {
			for _, f := range r.check(files) {
				t.Error(f)
			}
		})
	}
}

// TestTopLevel keeps the root of the repository to the agreed names.
func TestTopLevel(t *testing.T) {
	entries, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !slices.Contains(topLevel, e.Name()) {
			t.Errorf("%s does not belong at the top level; the allowed names are in topLevel", e.Name())
		}
	}
}

// TestNoMachineTraces keeps paths of a machine and package hosts out of the tree.
func TestNoMachineTraces(t *testing.T) {
	banned := []string{"/" + "work/main", "/" + "root/", "proxy.golang" + ".org", "registry.npmjs" + ".org", "files.pythonhosted" + ".org"}
	err := filepath.WalkDir(".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if n := d.Name(); n == ".git" || n == ".cache" || n == "bin" || n == "node_modules" {
				return filepath.SkipDir
			}
			return nil
		}
		if n := d.Name(); n == ".git" || n == ".cache" {
			return nil // of a linked work tree
		}
		text, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		for _, b := range banned {
			if bytes.Contains(text, []byte(b)) {
				t.Errorf("%s contains %q", p, b)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestRulesCanFail plants one offence per rule and demands that it is found.
func TestRulesCanFail(t *testing.T) {
	doc := "// Package p is documented.\n"
	cases := []struct{ rule, file, text string }{
		{"imports", "proxy/x.go", doc + "package proxy\nimport _ \"" + module + "/control\"\n"},
		{"imports", "cache/tier/x.go", doc + "package tier\nimport _ \"" + module + "/cache\"\n"},
		{"imports", "deploy/x.go", doc + "package deploy\nimport _ \"net/http\"\n"},
		{"imports", "deploy/x.go", doc + "package deploy\nimport _ \"" + module + "/control\"\n"},
		{"imports", "proxy/x.go", doc + "package proxy\nimport _ \"github.com/hashicorp/consul/api\"\n"},
		{"imports", "control/x.go", doc + "package control\nimport _ \"github.com/envoyproxy/go-control-plane/pkg/cache/v3\"\n"},
		{"purity", "region/x.go", doc + "package region\nfunc f() { go f() }\n"},
		{"purity", "deploy/x.go", doc + "package deploy\nimport \"time\"\nvar _ = time.Now()\n"},
		{"docs", "proxy/x.go", "package proxy\n"},
		{"docs", "proxy/x.go", doc + "package proxy\nfunc Exported() {}\n"},
		{"banned", "proxy/x_test.go", "package proxy\nimport \"time\"\nfunc f() { time.Sleep(1) }\n"},
		{"banned", "proxy/x.go", doc + "package proxy\nimport \"time\"\nfunc f() { <-time.After(1) }\n"},
		{"banned", "proxy/x.go", doc + "package proxy\nfunc init() {}\n"},
		{"length", "proxy/x.go", doc + "package proxy\n" + strings.Repeat("\n", 700)},
	}
	for _, c := range cases {
		s, err := parseOne(token.NewFileSet(), c.file, []byte(c.text))
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range rules {
			if r.name == c.rule && len(r.check([]source{s})) == 0 {
				t.Errorf("rule %s did not find the offence in:\n%s", c.rule, c.text)
			}
		}
	}
	clean, err := parseOne(token.NewFileSet(), "proxy/x.go", []byte(doc+"package proxy\nimport _ \""+module+"/cache\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rules {
		if got := r.check([]source{clean}); len(got) != 0 {
			t.Errorf("rule %s finds offences in a clean file: %v", r.name, got)
		}
	}
}
