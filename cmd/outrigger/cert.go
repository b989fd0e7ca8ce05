//go:build !dataplane

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/identity"
)

// Lives of trial certificates.
const (
	trialLife   = 30 * 24 * time.Hour
	trialCALife = 365 * 24 * time.Hour
	minTrial    = time.Minute
	maxTrial    = trialCALife
	// backdated keeps a certificate made here valid on a machine whose clock is behind.
	backdated = time.Minute
)

type certFlags struct {
	dir, domain string
	hosts       []string
	life        time.Duration
}

func certCommand() *cobra.Command {
	cmd := group("cert", "Certificates for trying out encrypted connections")
	c := &certFlags{}
	create := &cobra.Command{Use: "create [NAME...]", Short: "Make a CA and certificates signed by it", Args: cobra.ArbitraryArgs,
		Long: `Create makes, in --dir, a CA (ca.crt, ca.key) unless there is one, and for every NAME a
certificate NAME.crt and its key NAME.key (ECDSA P-256, mode 0600) with the identity
spiffe://TRUST-DOMAIN/NAME. Without names they are control, node, sidecar and operator;
control's, and that of any name you give but the other three, is for the hosts of --hosts,
too, which are what clients dial. It overwrites
nothing: remove a certificate and its key to have it renewed, and processes that use them
take over the new ones within seconds.

It is for trying things out and for tests: whoever reads ca.key is everybody. In earnest
let cert-manager, SPIRE or your own CA write such files.`,
		RunE: func(cmd *cobra.Command, names []string) error {
			made, err := c.create(names, time.Now())
			for _, m := range made {
				fmt.Fprintln(cmd.OutOrStdout(), m)
			}
			return err
		}}
	f := create.Flags()
	f.StringVar(&c.dir, "dir", "certs", "directory for the files, made when missing")
	f.StringVar(&c.domain, "trust-domain", "outrigger.test", "domain of the identities")
	f.StringSliceVar(&c.hosts, "hosts", []string{"localhost", "127.0.0.1", "::1"}, "DNS names and IP addresses that the certificate control may serve")
	f.DurationVar(&c.life, "life", trialLife, "until certificates end, at most the CA's year")
	cmd.AddCommand(create)
	return cmd
}

func (c *certFlags) create(names []string, now time.Time) (made []string, err error) {
	if len(names) == 0 {
		names = []string{"control", "node", "sidecar", "operator"}
	}
	for _, n := range append([]string{c.domain}, names...) {
		if n == "ca" || n == "" || strings.ContainsFunc(n, func(r rune) bool {
			return (r < 'a' || r > 'z') && (r < '0' || r > '9') && !strings.ContainsRune("-_.", r)
		}) || n[0] == '.' {
			return nil, usageError{fmt.Errorf("%q cannot be the name of a certificate or trust domain; use lower-case letters, digits and -_. and not ca", n)}
		}
	}
	for _, h := range c.hosts {
		if net.ParseIP(h) == nil && (h == "" || strings.ContainsAny(h, "/: ")) {
			return nil, usageError{fmt.Errorf("--hosts has %q; give DNS names and IP addresses without ports", h)}
		}
	}
	if c.life < minTrial || c.life > maxTrial {
		return nil, usageError{fmt.Errorf("--life is %v; give %v to %v", c.life, minTrial, maxTrial)}
	}
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return nil, configError{fmt.Errorf("--dir: %w", err)}
	}
	for _, n := range names {
		for _, file := range []string{n + ".crt", n + ".key"} {
			if _, err := os.Lstat(filepath.Join(c.dir, file)); !errors.Is(err, fs.ErrNotExist) {
				return nil, configError{fmt.Errorf("%s is there already and is not overwritten; remove it to have a new one, or give another --dir", filepath.Join(c.dir, file))}
			}
		}
	}
	ca, made, err := c.authority(now)
	if err != nil {
		return nil, err
	}
	for _, n := range names {
		l := identity.Leaf{Name: n, URI: "spiffe://" + c.domain + "/" + n, Begin: now.Add(-backdated), Until: now.Add(c.life)}
		if l.Until.After(ca.Until()) {
			l.Until = ca.Until()
		}
		if !slices.Contains([]string{"node", "sidecar", "operator"}, n) { // those only dial
			l.Hosts = c.hosts
		}
		cert, key, err := ca.Issue(l)
		if err != nil {
			return made, err
		}
		files, err := c.write(n, cert, key)
		made = append(made, files...)
		if err != nil {
			return made, err
		}
	}
	return made, nil
}

// authority is the CA of the directory, made if there is none.
func (c *certFlags) authority(now time.Time) (*identity.Authority, []string, error) {
	cert, cerr := os.ReadFile(filepath.Join(c.dir, "ca.crt"))
	key, kerr := os.ReadFile(filepath.Join(c.dir, "ca.key"))
	switch {
	case errors.Is(cerr, fs.ErrNotExist) && errors.Is(kerr, fs.ErrNotExist):
		ca, err := identity.NewAuthority("Outrigger trial CA "+c.domain, now.Add(-backdated), now.Add(trialCALife))
		if err != nil {
			return nil, nil, err
		}
		if cert, key, err = ca.Text(); err != nil {
			return nil, nil, err
		}
		files, err := c.write("ca", cert, key)
		return ca, files, err
	case cerr != nil || kerr != nil:
		return nil, nil, configError{fmt.Errorf("--dir: %w", errors.Join(cerr, kerr))}
	}
	ca, err := identity.ParseAuthority(cert, key)
	if err == nil && !now.Before(ca.Until()) {
		err = outrigger.Errorf(outrigger.Invalid, "the CA expired at %s; give another --dir", ca.Until().UTC().Format(time.RFC3339))
	}
	if err != nil {
		return nil, nil, configError{fmt.Errorf("%s: %w", filepath.Join(c.dir, "ca.crt"), err)}
	}
	return ca, nil, nil
}

// write makes NAME.key, then NAME.crt: whoever follows the certificate finds its key.
func (c *certFlags) write(name string, cert, key []byte) (made []string, err error) {
	for _, x := range []struct {
		file string
		text []byte
		mode fs.FileMode
	}{{name + ".key", key, 0o600}, {name + ".crt", cert, 0o644}} {
		path := filepath.Join(c.dir, x.file)
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, x.mode)
		if err != nil {
			return made, configError{err}
		}
		_, err = f.Write(x.text)
		if err = errors.Join(err, f.Close()); err != nil {
			return made, configError{err}
		}
		made = append(made, path)
	}
	return made, nil
}
