package consul

import (
	"net"
	"strconv"

	"github.com/outrigger-mesh/outrigger"
)

func splitGateway(gateway string) (host string, port int, err error) {
	host, p, err := net.SplitHostPort(gateway)
	if err != nil {
		return "", 0, outrigger.Errorf(outrigger.Invalid, "gateway %q is not host:port", gateway)
	}
	port, err = strconv.Atoi(p)
	if err != nil || port < 1 || port > 65535 {
		return "", 0, outrigger.Errorf(outrigger.Invalid, "gateway %q: port %q is not within 1 to 65535", gateway, p)
	}
	return host, port, nil
}

func joinGateway(host string, port int) string { return net.JoinHostPort(host, strconv.Itoa(port)) }
