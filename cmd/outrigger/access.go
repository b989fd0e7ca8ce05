//go:build !dataplane

package main

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/authz"
)

// accessEvery is how often a control plane looks at its access file.
const accessEvery = 2 * time.Second

// maxAccessFile bounds what is read: authz.MaxPeople lines fit many times.
const maxAccessFile = 1 << 20

// accessFile is the people of a control plane, read again while it runs. A file that is
// gone or bad changes nothing and is logged once.
type accessFile struct {
	path   string
	p      *process
	latest atomic.Pointer[authz.Policy]
	last   string // content or failure of the last look; of run alone
}

// openAccess reads the file; without one nobody is known.
func openAccess(p *process, path string) (*accessFile, error) {
	a := &accessFile{path: path, p: p}
	a.latest.Store(&authz.Policy{})
	if path == "" {
		return a, nil
	}
	text, policy, err := readAccess(path)
	if err != nil {
		return nil, configError{fmt.Errorf("--access-file: %w", err)}
	}
	a.last = text
	a.latest.Store(&policy)
	return a, nil
}

func (a *accessFile) policy() authz.Policy { return *a.latest.Load() }

func readAccess(path string) (string, authz.Policy, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", authz.Policy{}, err
	}
	if info.Size() > maxAccessFile {
		return "", authz.Policy{}, fmt.Errorf("%s has %d bytes, the limit is %d", path, info.Size(), maxAccessFile)
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return "", authz.Policy{}, err
	}
	policy, err := authz.Parse(string(raw))
	if err != nil {
		return "", authz.Policy{}, fmt.Errorf("%s: %w", path, err)
	}
	return string(raw), policy, nil
}

func (a *accessFile) run(ctx context.Context) error {
	if a.path == "" {
		<-ctx.Done()
		return nil
	}
	tick := time.NewTicker(accessEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		text, policy, err := readAccess(a.path)
		if err != nil {
			text = err.Error()
		}
		if text == a.last {
			continue
		}
		a.last = text
		if err != nil {
			a.p.log.Error("the access file cannot be used; the people read before stay", "error", err)
			continue
		}
		a.latest.Store(&policy)
		a.p.log.Info("other people may operate now", "credentials", len(policy.People()))
	}
}

// accessCommand edits an access file. It talks to no server: whoever may write the file decides.
func accessCommand() *cobra.Command {
	cmd := group("access", "Who may operate a control plane, as what")
	var file string
	cmd.PersistentFlags().StringVar(&file, "file", "", "the access file of outrigger control --access-file")
	var role string
	add := &cobra.Command{Use: "add NAME", Short: "Make a token for a person; it is shown once and kept as a digest", Args: exactArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, ok := authz.RoleOf(role)
			if !ok {
				return usageError{fmt.Errorf("--role is %q; give viewer, operator or admin", role)}
			}
			token := rand.Text() + rand.Text()
			if err := editAccess(file, func(lines []string) ([]string, error) {
				return append(lines, authz.Line(args[0], r, token)), nil
			}); err != nil {
				return err
			}
			_, err := fmt.Fprintln(cmd.OutOrStdout(), token)
			return err
		}}
	add.Flags().StringVar(&role, "role", "viewer", "viewer, operator or admin")
	remove := &cobra.Command{Use: "remove NAME", Short: "Take all tokens of a person out", Args: exactArgs("NAME"),
		RunE: func(_ *cobra.Command, args []string) error {
			return editAccess(file, func(lines []string) ([]string, error) {
				left := slices.DeleteFunc(slices.Clone(lines), func(l string) bool { return strings.HasPrefix(strings.TrimSpace(l), args[0]+" ") })
				if len(left) == len(lines) {
					return nil, outrigger.Errorf(outrigger.NotFound, "%s not found in the access file", args[0])
				}
				return left, nil
			})
		}}
	list := &cobra.Command{Use: "list", Short: "The people and their roles", Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, policy, err := readAccess(file)
			if err != nil {
				return configError{err}
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)
			fmt.Fprintln(w, "NAME\tROLE")
			for _, q := range policy.People() {
				fmt.Fprintf(w, "%s\t%s\n", q.Name, q.Role)
			}
			return w.Flush()
		}}
	cmd.AddCommand(add, remove, list)
	return cmd
}

// editAccess replaces the file in one step by what edit makes of its lines, if that can be
// used: a control plane that reads it meanwhile sees the old or the new one.
func editAccess(path string, edit func([]string) ([]string, error)) error {
	if path == "" {
		return usageError{errors.New("--file is empty; name the access file")}
	}
	raw, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return configError{err}
	}
	var lines []string
	if text := strings.TrimRight(string(raw), "\n"); text != "" {
		lines = strings.Split(text, "\n")
	}
	if lines, err = edit(lines); err != nil {
		return err
	}
	text := strings.Join(lines, "\n") + "\n"
	if strings.TrimSpace(text) != "" {
		if _, err := authz.Parse(text); err != nil {
			return configError{err}
		}
	}
	suffix := make([]byte, 6)
	if _, err := rand.Read(suffix); err != nil {
		return err
	}
	next := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+"."+base64.RawURLEncoding.EncodeToString(suffix))
	if err := os.WriteFile(next, []byte(text), 0o600); err != nil {
		return configError{err}
	}
	return errors.Join(os.Rename(next, path))
}
