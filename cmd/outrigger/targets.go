package main

import (
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
)

// targets splits the address of a control plane with several replicas.
func targets(target string) []string {
	var out []string
	for t := range strings.SplitSeq(target, ",") {
		if t = strings.TrimSpace(t); t != "" {
			out = append(out, t)
		}
	}
	return out
}

// replicas makes gRPC try the addresses in order and stay with the first that answers until it
// goes away. Each has to prove the name it is dialled by.
func replicas(addresses []string) grpc.DialOption {
	r := manual.NewBuilderWithScheme("replicas")
	var s resolver.State
	for _, a := range addresses {
		s.Endpoints = append(s.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: a, ServerName: a}}})
	}
	r.InitialState(s)
	return grpc.WithResolvers(r)
}
