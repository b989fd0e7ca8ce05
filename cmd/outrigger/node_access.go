package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"github.com/outrigger-mesh/outrigger/cache/node"
)

// access reads --tenant-users and --tenant-groups; nil when there are none.
func (n *nodeFlags) access() (*node.Access, error) {
	if len(n.tenantUsers) == 0 && len(n.tenantGroups) == 0 {
		return nil, nil
	}
	if n.tenant != "" {
		return nil, errors.New("--tenant binds the whole agent to one tenant, --tenant-users and --tenant-groups bind each process to its own; give one or the other")
	}
	users, err := ids("--tenant-users", n.tenantUsers)
	if err != nil {
		return nil, err
	}
	groups, err := ids("--tenant-groups", n.tenantGroups)
	if err != nil {
		return nil, err
	}
	a, err := node.NewAccess(users, groups)
	if err != nil {
		return nil, err
	}
	if part := n.tableBytes / int64(len(a.Tenants())); part < minTableBytes {
		return nil, fmt.Errorf("--table-bytes is %d, which leaves %d bytes to each of %d tenants; give at least %d", n.tableBytes, part, len(a.Tenants()), minTableBytes*len(a.Tenants()))
	}
	return a, nil
}

func ids(flag string, of map[string]string) (map[uint32]string, error) {
	out := map[uint32]string{}
	for text, tenant := range of {
		id, err := strconv.ParseUint(text, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("%s has %q=%q; give number=tenant, as id -u prints it", flag, text, tenant)
		}
		out[uint32(id)] = tenant
	}
	return out, nil
}

// makeDir makes the directory of the sockets. Without an Access its permissions say who
// may connect. With one the kernel is asked who did, so others must be able to reach the
// sockets; they cannot list the directory or put anything there.
func makeDir(dir string, access *node.Access) error {
	if access == nil {
		return os.MkdirAll(dir, 0o700)
	}
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return err
		}
		return os.Chmod(dir, 0o711) // whatever the umask says
	case err != nil:
		return err
	case info.Mode()&0o011 == 0:
		return fmt.Errorf("%s has mode %#o, so the tenants' users cannot reach the sockets in it; allow them: chmod 711 %s", dir, info.Mode().Perm(), dir)
	}
	return nil
}

// openSockets lets everybody connect to the agent's sockets; the Access decides then.
func openSockets(dir string, access *node.Access) error {
	if access == nil {
		return nil
	}
	return errors.Join(os.Chmod(filepath.Join(dir, agentSocket), 0o666), os.Chmod(filepath.Join(dir, tableSocket), 0o666))
}
