package artifacts_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/iotest"

	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/control/artifacts"
)

func digestOf(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// noise is content that no two sizes share.
func noise(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(n), byte(n >> 8)}).Read(b)
	return b
}

func open(t *testing.T, o artifacts.Options) (*artifacts.Store, string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "store")
	s, err := artifacts.Open(context.Background(), "file://"+dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s, dir
}

// files are the paths below dir, relative to it.
func files(t *testing.T, dir string) (out []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			out = append(out, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestPutGet(t *testing.T) {
	s, dir := open(t, artifacts.Options{})
	ctx := context.Background()
	for _, n := range []int{0, 1, artifacts.HoldBack - 1, artifacts.HoldBack, artifacts.HoldBack + 1, 3*artifacts.HoldBack + 17} {
		content := noise(n)
		for range 2 { // again is no error
			a, err := s.Put(ctx, digestOf(content), iotest.HalfReader(bytes.NewReader(content)))
			if err != nil || a.Bytes != int64(n) || a.Digest != digestOf(content) || a.StoredAt.IsZero() {
				t.Fatalf("%d bytes: %+v, %v", n, a, err)
			}
		}
		a, r, err := s.Get(ctx, digestOf(content))
		if err != nil || a.Bytes != int64(n) {
			t.Fatalf("%d bytes: %+v, %v", n, a, err)
		}
		got, err := io.ReadAll(r)
		if err != nil || !bytes.Equal(got, content) {
			t.Errorf("%d bytes: read %d, %v", n, len(got), err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
	if all, err := s.List(ctx, 100); err != nil || len(all) != 6 || len(files(t, dir)) != 6 {
		t.Errorf("%v, %v, files %v", all, err, files(t, dir))
	}
}

// TestPutNothing: whatever goes wrong, no object and no temporary file stays.
func TestPutNothing(t *testing.T) {
	s, dir := open(t, artifacts.Options{MaxBytes: 1000})
	content, other := noise(900), digestOf([]byte("other"))
	for name, c := range map[string]struct {
		digest string
		body   io.Reader
		kind   outrigger.Kind
		want   []string
	}{
		"mismatch":  {other, bytes.NewReader(content), outrigger.Invalid, []string{"900 bytes", digestOf(content), "expected " + other}},
		"malformed": {"sha256:12", bytes.NewReader(content), outrigger.Invalid, []string{`artifact "sha256:12"`, "64"}},
		"path":      {"../../etc/passwd", bytes.NewReader(content), outrigger.Invalid, []string{"64"}},
		"too long":  {digestOf(noise(1001)), bytes.NewReader(noise(1001)), outrigger.Exhausted, []string{"1000 bytes"}},
		"broken off": {digestOf(content), io.MultiReader(bytes.NewReader(content[:500]), iotest.ErrReader(io.ErrUnexpectedEOF)),
			outrigger.Cancelled, []string{digestOf(content), "nothing was stored"}},
	} {
		_, err := s.Put(context.Background(), c.digest, c.body)
		if !outrigger.IsKind(err, c.kind) {
			t.Errorf("%s: %v, want kind %v", name, err, c.kind)
			continue
		}
		for _, text := range c.want {
			if !strings.Contains(err.Error(), text) {
				t.Errorf("%s: %v does not say %s", name, err, text)
			}
		}
		if left := files(t, dir); len(left) != 0 {
			t.Errorf("%s: left behind %v", name, left)
		}
	}
	if _, _, err := s.Get(context.Background(), digestOf(content)); !outrigger.IsKind(err, outrigger.NotFound) {
		t.Errorf("get what was never stored: %v", err)
	}
}

// TestBadCopy: bytes that changed in the store are never given out as whole.
func TestBadCopy(t *testing.T) {
	for name, spoil := range map[string]func([]byte) []byte{
		"first byte": func(b []byte) []byte { b[0]++; return b },
		"last byte":  func(b []byte) []byte { b[len(b)-1]++; return b },
		"shorter":    func(b []byte) []byte { return b[:len(b)-1] },
		"longer":     func(b []byte) []byte { return append(b, 0) },
	} {
		for _, n := range []int{100, artifacts.HoldBack, 2*artifacts.HoldBack + 5} {
			s, dir := open(t, artifacts.Options{})
			content := noise(n)
			if _, err := s.Put(context.Background(), digestOf(content), bytes.NewReader(content)); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(files(t, dir)[0], spoil(bytes.Clone(content)), 0o600); err != nil {
				t.Fatal(err)
			}
			_, r, err := s.Get(context.Background(), digestOf(content))
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(r)
			if !outrigger.IsKind(err, outrigger.Unavailable) || !strings.Contains(err.Error(), "expected "+digestOf(content)) || len(got) >= len(spoil(bytes.Clone(content))) {
				t.Errorf("%s of %d bytes: gave %d bytes and %v", name, n, len(got), err)
			}
			if err := r.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestTransfersAreBounded(t *testing.T) {
	s, _ := open(t, artifacts.Options{MaxTransfers: 1})
	content := noise(10)
	if _, err := s.Put(context.Background(), digestOf(content), bytes.NewReader(content)); err != nil {
		t.Fatal(err)
	}
	_, r, err := s.Get(context.Background(), digestOf(content))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Get(context.Background(), digestOf(content)); !outrigger.IsKind(err, outrigger.Exhausted) || !strings.Contains(err.Error(), "limit is 1") {
		t.Errorf("the second at once: %v", err)
	}
	if err := errors.Join(r.Close(), r.Close()); err != nil && !errors.Is(err, fs.ErrClosed) {
		t.Logf("closing twice: %v", err)
	}
	for range 2 { // closing twice gave back one slot, not two
		if _, err := s.Put(context.Background(), digestOf(content), bytes.NewReader(content)); err != nil {
			t.Error(err)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	for _, u := range []string{"", "/tmp/x", "gs://bucket", "file:///proc/nothing/here", "mem://", "s3://bucket?nonsense=1", "::"} {
		if s, err := artifacts.Open(context.Background(), u, artifacts.Options{}); !outrigger.IsKind(err, outrigger.Invalid) || !strings.Contains(err.Error(), u) {
			t.Errorf("%q: %v, %v", u, s, err)
		}
	}
}

// TestHTTP is a session over a real connection, where bodies can break off.
func TestHTTP(t *testing.T) {
	s, dir := open(t, artifacts.Options{})
	var mu sync.Mutex // a handler may outlive a caller that broke off
	asked := map[string]int{}
	srv := httptest.NewServer(s.Handler(func(_ context.Context, verb string) (func(proto.Message) error, func(error), error) {
		mu.Lock()
		defer mu.Unlock()
		asked[verb]++
		return nil, nil, nil
	}))
	defer srv.Close()
	content := noise(artifacts.HoldBack*2 + 3)
	at := srv.URL + "/v1/artifacts/" + digestOf(content)
	do := func(method, url string, body io.Reader, header ...string) (*http.Response, []byte, error) {
		r, err := http.NewRequest(method, url, body)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i+1 < len(header); i += 2 {
			r.Header.Set(header[i], header[i+1])
		}
		resp, err := srv.Client().Do(r)
		if err != nil {
			return nil, nil, err
		}
		defer resp.Body.Close()
		got, err := io.ReadAll(resp.Body)
		return resp, got, err
	}
	want := func(what string, resp *http.Response, got []byte, err error, code int, text string) {
		t.Helper()
		if err != nil || resp.StatusCode != code || !strings.Contains(string(got), text) {
			t.Fatalf("%s: %v, %v, %.200s; want %d with %q", what, resp, err, got, code, text)
		}
	}
	resp, got, err := do("GET", at, nil)
	want("nothing yet", resp, got, err, 404, "not found")
	resp, got, err = do("PUT", at, bytes.NewReader(content[1:]))
	want("other bytes", resp, got, err, 400, digestOf(content[1:]))
	if _, _, err = do("PUT", at, io.MultiReader(bytes.NewReader(content[:70_000]), iotest.ErrReader(errors.New("the cable is out")))); err == nil {
		t.Error("half a body was accepted")
	}
	resp, got, err = do("PUT", at, bytes.NewReader(content))
	want("upload", resp, got, err, 201, `"bytes":524291`)
	resp, got, err = do("HEAD", at, nil)
	want("head", resp, got, err, 200, "")
	if resp.ContentLength != int64(len(content)) {
		t.Errorf("length %d", resp.ContentLength)
	}
	resp, got, err = do("GET", at, nil)
	want("download", resp, got, err, 200, string(content))
	resp, got, err = do("GET", at, nil, "If-None-Match", resp.Header.Get("Etag"))
	want("known already", resp, got, err, 304, "")
	resp, got, err = do("GET", srv.URL+"/v1/artifacts?limit=5", nil)
	want("list", resp, got, err, 200, digestOf(content))
	resp, got, err = do("GET", srv.URL+"/v1/artifacts?limit=many", nil)
	want("bad limit", resp, got, err, 400, "1..1000")
	resp, got, err = do("DELETE", at, nil)
	want("delete", resp, got, err, 404, "PUT, GET and HEAD")
	mu.Lock()
	// Whether the server ever saw the call that broke off is nobody's promise.
	if put := asked[artifacts.VerbPut]; put < 2 || put > 3 || asked[artifacts.VerbGet] != 4 || asked[artifacts.VerbList] != 2 {
		t.Errorf("the gate was asked about %v", asked)
	}
	mu.Unlock()
	// A copy that went bad: the connection breaks before the last bytes.
	path := files(t, dir)[0]
	if err := os.WriteFile(path, append([]byte{content[0] + 1}, content[1:]...), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, got, err = do("GET", at, nil); err == nil || len(got) >= len(content) {
		t.Errorf("a bad copy came as %d bytes, %v", len(got), err)
	}
	// A small one is refused with the reason.
	small := noise(50)
	at = srv.URL + "/v1/artifacts/" + digestOf(small)
	resp, got, err = do("PUT", at, bytes.NewReader(small))
	want("small", resp, got, err, 201, "")
	for _, f := range files(t, dir) {
		if f != path {
			if err := os.WriteFile(f, noise(51)[:50], 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	resp, got, err = do("GET", at, nil)
	want("small and bad", resp, got, err, 503, "expected "+digestOf(small))
}
