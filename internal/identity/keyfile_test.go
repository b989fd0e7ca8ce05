package identity

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// A rotation as the package comment describes it, in one process that goes on running:
// nothing signed on the way is refused until its key is removed, and a file that is bad or
// gone in between changes nothing.
func TestKeyFileRotates(t *testing.T) {
	path := filepath.Join(t.TempDir(), "token.key")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	was, next := NewKeys(), NewKeys()
	write(was.Text())
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		changed := 0
		f, err := OpenKeyFile(path, KeyFileOptions{Changed: func(*Keys) { changed++ }, Logger: slog.New(slog.NewTextHandler(&log, nil))})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ran := make(chan error)
		go func() { ran <- f.Run(ctx) }()
		token := Token{}.With(dot("eu", 1, 5))
		old, fresh := was.Sign(token), next.Sign(token)
		for _, tt := range []struct {
			name       string
			file       string // "-" = there is none
			signs      string
			old, fresh bool // verify
			changes    int
		}{
			{"as it was", was.Text(), old, true, false, 0},
			{"the new key second", was.Text() + next.Text(), old, true, true, 1},
			{"bad", "not a key\n", old, true, true, 1},
			{"still bad", "not a key\n", old, true, true, 1},
			{"empty", "", old, true, true, 1},
			{"gone", "-", old, true, true, 1},
			{"swapped", next.Text() + was.Text(), fresh, true, true, 2},
			{"the old key removed", next.Text(), fresh, false, true, 3},
		} {
			if tt.file == "-" {
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
			} else {
				write(tt.file)
			}
			time.Sleep(keyFileEvery)
			synctest.Wait()
			k := f.Keys()
			_, errOld := k.Verify(old)
			_, errFresh := k.Verify(fresh)
			if got := k.Sign(token); got != tt.signs || (errOld == nil) != tt.old || (errFresh == nil) != tt.fresh || changed != tt.changes {
				t.Errorf("%s: old verifies: %v, new verifies: %v, %d changes; want %+v", tt.name, errOld, errFresh, changed, tt)
			}
		}
		cancel()
		if err := <-ran; err != nil {
			t.Error(err)
		}
		// Bad (once), empty, gone.
		if n := strings.Count(log.String(), "level=ERROR"); n != 3 {
			t.Errorf("%d failures logged, want 3:\n%s", n, log.String())
		}
		if strings.Contains(log.String(), strings.TrimSpace(next.Text())) {
			t.Error("a key is in the log")
		}
	})
	if _, err := OpenKeyFile(filepath.Join(t.TempDir(), "none"), KeyFileOptions{}); err == nil {
		t.Error("a process starts without the key file it was told to use")
	}
}
