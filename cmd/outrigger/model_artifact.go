//go:build !dataplane

package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/control/artifacts"
	"github.com/outrigger-mesh/outrigger/deploy/models"
	"github.com/outrigger-mesh/outrigger/internal/identity"
)

func modelArtifact(c *clientFlags) *cobra.Command {
	cmd := group("artifact", "Store and fetch the files of model versions")
	cmd.Long = `Artifact moves files to and from the control plane's store, which names them by the
SHA-256 of their bytes. These verbs speak REST: --rest is the control plane's HTTP address.`
	a := &artifactClient{flags: c}
	cmd.PersistentFlags().StringVar(&a.at, "rest", "127.0.0.1:7401", "HTTP address of the control plane, host:port or unix:path")
	push := &cobra.Command{Use: "push FILE", Short: "Store a file and print its digest", Args: exactArgs("FILE"), RunE: a.run(a.push)}
	out := ""
	pull := &cobra.Command{Use: "pull DIGEST", Short: "Fetch a file, verified, under the name of --out", Args: exactArgs("DIGEST"),
		RunE: a.run(func(cmd *cobra.Command, args []string) error { return a.pull(cmd, args[0], out) })}
	pull.Flags().StringVar(&out, "out", "", "file to write, which appears when it is whole; - = standard output, as it comes")
	cmd.AddCommand(push, pull)
	return cmd
}

// artifactClient speaks to the store of a control plane.
type artifactClient struct {
	flags  *clientFlags
	at     string
	token  string
	scheme string
	http   *http.Client
}

// run prepares the connection. Transfers take what they take; the server breaks off what
// stands still, and an interrupt ends them here.
func (a *artifactClient) run(do func(*cobra.Command, []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) (err error) {
		if err := a.flags.g.configureClient(cmd); err != nil {
			return err
		}
		if a.token, err = readSecret("--token-file", a.flags.tokenFile); err != nil {
			return err
		}
		t := &http.Transport{DisableKeepAlives: true}
		if path, ok := strings.CutPrefix(a.at, "unix:"); ok {
			t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", path)
			}
		}
		tls, err := a.flags.tls.open(identity.CredentialsOptions{})
		if err != nil {
			return err
		}
		a.scheme = "http://"
		if secured(tls, a.at) {
			a.scheme, t = "https://", tls.Transport(t)
		}
		a.http = &http.Client{Transport: t}
		return do(cmd, args)
	}
}

func (a *artifactClient) request(ctx context.Context, method, digest string, body io.Reader) (*http.Request, error) {
	host := a.at
	if strings.HasPrefix(host, "unix:") {
		host = "localhost"
	}
	r, err := http.NewRequestWithContext(ctx, method, a.scheme+host+"/v1/artifacts/"+digest, body)
	if err != nil {
		return nil, usageError{fmt.Errorf("--rest %q: %w", a.at, err)}
	}
	if a.token != "" {
		r.Header.Set("authorization", "Bearer "+a.token)
	}
	return r, nil
}

// do sends a request and turns an error of the server into ours.
func (a *artifactClient) do(r *http.Request) (*http.Response, error) {
	resp, err := a.http.Do(r)
	if err != nil {
		return nil, outrigger.Errorf(outrigger.Unavailable, "%v (REST at %s; is it running? choose another with --rest)", err, a.at)
	}
	if resp.StatusCode < 300 {
		return resp, nil
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, 1<<16))
	var answer struct{ Error struct{ Message string } }
	if err != nil || json.Unmarshal(raw, &answer) != nil || answer.Error.Message == "" {
		return nil, fmt.Errorf("REST at %s answers %s", a.at, resp.Status)
	}
	return nil, fmt.Errorf("%s", answer.Error.Message)
}

// push reads the file twice, first for its name. A file that changes meanwhile has another
// digest, and the store refuses it.
func (a *artifactClient) push(cmd *cobra.Command, args []string) error {
	f, err := os.Open(args[0])
	if err != nil {
		return err
	}
	defer f.Close()
	digest, size, err := digestOf(f)
	if err != nil {
		return err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	r, err := a.request(cmd.Context(), http.MethodPut, digest, io.NopCloser(f))
	if err != nil {
		return err
	}
	r.ContentLength = size
	r.Header.Set("content-type", "application/octet-stream")
	resp, err := a.do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var stored artifacts.Artifact
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<16)).Decode(&stored); err != nil {
		return fmt.Errorf("REST at %s: %w", a.at, err)
	}
	if a.flags.g.output == "json" {
		return json.NewEncoder(cmd.OutOrStdout()).Encode(stored)
	}
	fmt.Fprintln(cmd.OutOrStdout(), stored.Digest)
	return nil
}

func digestOf(r io.Reader) (digest string, size int64, err error) {
	h := sha256.New()
	size, err = io.Copy(h, r)
	return "sha256:" + hex.EncodeToString(h.Sum(nil)), size, err
}

// pull verifies what comes once more: the store's word is not the wire's.
func (a *artifactClient) pull(cmd *cobra.Command, digest, out string) (err error) {
	if err := models.CheckDigest("DIGEST", digest); err != nil {
		return usageError{err}
	}
	if out == "" {
		return usageError{fmt.Errorf("give --out, the file to write")}
	}
	r, err := a.request(cmd.Context(), http.MethodGet, digest, nil)
	if err != nil {
		return err
	}
	resp, err := a.do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	w, keep := cmd.OutOrStdout(), func() error { return nil }
	if out != "-" {
		// Beside its place, so that it can be renamed into it.
		f, err := os.CreateTemp(filepath.Dir(out), "."+filepath.Base(out)+".*")
		if err != nil {
			return err
		}
		defer os.Remove(f.Name()) // fails once it is renamed
		defer f.Close()
		w = f
		keep = func() error {
			if err := f.Close(); err != nil {
				return err
			}
			return os.Rename(f.Name(), out)
		}
	}
	got, n, err := digestOf(io.TeeReader(resp.Body, w))
	if err != nil {
		return fmt.Errorf("artifact %s broke off after %d bytes: %w", digest, n, err)
	}
	if got != digest {
		return outrigger.Errorf(outrigger.Conflict, "artifact: the %d bytes that came have digest %s, expected %s; nothing was kept", n, got, digest)
	}
	return keep()
}
