package artifacts_test

import (
	"bytes"
	"context"
	"io"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/control/artifacts"
)

// bucket serves S3 on this machine, with one bucket called models, and returns the URL of a
// store in it.
func bucket(t *testing.T) (*s3mem.Backend, *httptest.Server, string) {
	t.Helper()
	t.Setenv("AWS_ACCESS_KEY_ID", "test")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "test")
	t.Setenv("AWS_CONFIG_FILE", filepath.Join(t.TempDir(), "none")) // not this user's
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", filepath.Join(t.TempDir(), "none"))
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	t.Setenv("AWS_MAX_ATTEMPTS", "1")
	back := s3mem.New()
	if err := back.CreateBucket("models"); err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(gofakes3.New(back).Server())
	t.Cleanup(srv.Close)
	q := url.Values{"region": {"us-east-1"}, "endpoint": {srv.URL}, "use_path_style": {"true"}}
	return back, srv, "s3://models?" + q.Encode()
}

func openURL(t *testing.T, at string) *artifacts.Store {
	t.Helper()
	s, err := artifacts.Open(t.Context(), at, artifacts.Options{MaxBytes: 16 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// objects are the names in the bucket.
func objects(t *testing.T, back *s3mem.Backend) (out []string) {
	t.Helper()
	l, err := back.ListBucket("models", nil, gofakes3.ListBucketPage{})
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range l.Contents {
		out = append(out, o.Key)
	}
	return out
}

// The store's promises over S3: what is put comes back, in one part or several; what must not
// be stored leaves no object; a copy that went bad is found out; a store that is away says so.
func TestS3(t *testing.T) {
	back, srv, at := bucket(t)
	ctx, s := context.Background(), openURL(t, at)
	sizes := []int{0, 1, artifacts.HoldBack + 1, 5<<20 + 3, 11 << 20}
	for _, n := range sizes {
		content := noise(n)
		for range 2 {
			if a, err := s.Put(ctx, digestOf(content), bytes.NewReader(content)); err != nil || a.Bytes != int64(n) {
				t.Fatalf("%d bytes: %+v, %v", n, a, err)
			}
		}
		_, r, err := openURL(t, at).Get(ctx, digestOf(content)) // another process
		if err != nil {
			t.Fatalf("%d bytes: %v", n, err)
		}
		got, err := io.ReadAll(r)
		if err != nil || !bytes.Equal(got, content) {
			t.Errorf("%d bytes: read %d, %v", n, len(got), err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
	if all, err := s.List(ctx, 100); err != nil || len(all) != len(sizes) {
		t.Errorf("listed %v, %v", all, err)
	}
	before := len(objects(t, back))
	content := noise(6 << 20)
	for name, c := range map[string]struct {
		body io.Reader
		kind outrigger.Kind
	}{
		"other bytes": {bytes.NewReader(noise(6<<20 + 1)), outrigger.Invalid},
		"broken off":  {io.MultiReader(bytes.NewReader(content[:5<<20+1]), iotest.ErrReader(io.ErrUnexpectedEOF)), outrigger.Cancelled},
		"too long":    {io.MultiReader(bytes.NewReader(content), bytes.NewReader(noise(11<<20))), outrigger.Exhausted},
	} {
		if _, err := s.Put(ctx, digestOf(content), c.body); !outrigger.IsKind(err, c.kind) {
			t.Errorf("%s: %v, want kind %v", name, err, c.kind)
		}
		if now := objects(t, back); len(now) != before {
			t.Errorf("%s left something: %v", name, now)
		}
	}
	bad := noise(artifacts.HoldBack + 1)
	for _, key := range objects(t, back) {
		if strings.HasSuffix(key, strings.TrimPrefix(digestOf(bad), "sha256:")) {
			spoilt := bytes.Clone(bad)
			spoilt[len(spoilt)-1]++
			if _, err := back.PutObject("models", key, map[string]string{}, bytes.NewReader(spoilt), int64(len(spoilt)), nil); err != nil {
				t.Fatal(err)
			}
		}
	}
	_, r, err := s.Get(ctx, digestOf(bad))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(r); !outrigger.IsKind(err, outrigger.Unavailable) || len(got) == len(bad) {
		t.Errorf("a bad copy: %d bytes, %v", len(got), err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if _, _, err := s.Get(ctx, digestOf([]byte("other"))); !outrigger.IsKind(err, outrigger.NotFound) {
		t.Errorf("what was never stored: %v", err)
	}
	srv.Close()
	if _, err := s.Put(ctx, digestOf(content), bytes.NewReader(content)); !outrigger.IsKind(err, outrigger.Unavailable) {
		t.Errorf("a store that is away: %v, want kind unavailable", err)
	}
}
