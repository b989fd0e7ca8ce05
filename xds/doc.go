// Package xds documents how Outrigger speaks xDS: resource names, type URLs, versions
// and the acknowledgement rules. It holds no code but the shared names; policy is the
// typed model, translate its xDS form, adsserver and adsclient the two ends of the wire.
//
// # Resources
//
// One model is one chain of standard resources plus one typed resource of ours, so
// that Envoy and proxyless gRPC obey the same policy as our sidecars:
//
//	Listener               model/<model>            api_listener → RouteConfiguration
//	RouteConfiguration     model/<model>            bucket ranges → clusters
//	Cluster                model/<model>/<version>  EDS, breaker, ejection
//	ClusterLoadAssignment  model/<model>/<version>  endpoints by region and priority
//	Secret                 ca/<name>                a trust bundle, named by clusters
//	Secret                 certificate/<name>       a client certificate with its private key
//	ModelPolicy            <model>                  salt, unit, epoch, last good, lease
//	MeshPolicy             mesh                     log position, regions
//
// Sidecars follow all of these. Proxyless gRPC clients and Envoys are node groups of
// their own, whose sets hold no ModelPolicy and, where a feature needs it, more:
//
//	Cluster                failover/<model>/<version>  aggregate: the version, then the last good
//	Listener               envoy/egress, envoy/capture   where an Envoy takes requests
//	ScopedRouteConfiguration  <model>                which model has which routes
//	RouteConfiguration     envoy/passthrough         captured requests of no model
//	Cluster                envoy/original-dst        where they wanted to go
//	TypedExtensionConfig   outrigger/assign          the bucket rule, as a Lua filter
//	Runtime                outrigger                 kill switches
//	Runtime                outrigger-lease           candidates, for as long as the control plane is heard
//
// Model names may hold '/', version names may not, so the last '/' of a cluster name
// ends the model. A proxyless gRPC client dials "xds:///model/<model>".
//
// # Versions
//
// The version of a resource is a hash of its deterministic bytes. The same content has
// the same version on every replica and after every restart, and a version is never
// reused for other content. The version of a type (state of the world only) is a hash
// over the names and versions of its resources.
//
// # The dead-man lease of Envoys
//
// An Envoy serves a candidate (policy.Model.DeadMan > 0) by a runtime key that the layer
// outrigger-lease sets to 100 and that both its default and the layer below have at 0. That
// resource is sent with a time to live, 19/20 of the shortest lease of all models, and armed anew by
// heartbeats: its name, version and time to live without a body
// (https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol#time-to-live). When
// none arrives the Envoy drops the layer by itself and the last good version serves; what the
// layer outrigger says stays, so that no kill switch is ever released by silence. Routes
// cannot carry the time to live: Envoy ignores the removal of a RouteConfiguration.
//
// # Pushes and acknowledgements
//
// A push is one consistent set of all types, made from one log position. A stream gets
// one push at a time (Cluster, ClusterLoadAssignment, Listener, RouteConfiguration,
// ModelPolicy, then MeshPolicy; https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol,
// "Eventual consistency considerations"); while it is being acknowledged newer
// positions wait, and the latest one follows: generations never queue.
//
//   - MeshPolicy carries the position, so it changes with every push and is sent last.
//     A position counts as acknowledged by a sidecar when every response of that push
//     was ACKed on the stream and no type is left NACKed.
//   - A NACK parks the type: nothing is resent before it changes. When one resource of
//     a rejected response changes, all resources of that response are sent again,
//     because clients differ in whether they kept the good ones (gRFC A46 says they do).
//   - A sidecar ACKs after the new policy is in force, never before, and NACKs with the
//     name of the resource and the reason. The other models of the push take effect;
//     the rejected model stays at its last good state.
//   - A subscription to a name the stream already holds is answered with the resource;
//     one to a name that does not exist is answered with removed_resources at once.
package xds

import (
	"slices"
	"strings"
)

// Type URLs of the resources, in the order they are pushed.
const (
	TypeCluster     = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	TypeEndpoint    = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
	TypeListener    = "type.googleapis.com/envoy.config.listener.v3.Listener"
	TypeRoute       = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
	TypeModelPolicy = "type.googleapis.com/outrigger.v1.ModelPolicy"
	TypeMeshPolicy  = "type.googleapis.com/outrigger.v1.MeshPolicy"
)

// Type URLs only Envoys ask for.
const (
	TypeRuntime     = "type.googleapis.com/envoy.service.runtime.v3.Runtime"
	TypeExtension   = "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig"
	TypeScopedRoute = "type.googleapis.com/envoy.config.route.v3.ScopedRouteConfiguration"
)

// TypeSecret is key material that clusters name (SDS). It is no part of a policy: it changes
// with files, not with the log. Sidecars and Envoys ask for it; gRPC has no SDS.
const TypeSecret = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// BundleName is the resource name of a trust bundle.
func BundleName(name string) string { return "ca/" + name }

// CertificateName is the resource name of a client certificate with its private key.
func CertificateName(name string) string { return "certificate/" + name }

// TypeRelayStanding is the type of the requests in which a relay says how far its pods are
// (outrigger.v1.RelayStanding). There are no resources of it.
const TypeRelayStanding = "type.googleapis.com/outrigger.v1.RelayStanding"

// KindRelay is the node kind of a relay: a client that passes on what sidecars are sent.
const KindRelay = "relay"

// Words of a relay to the sidecars behind it. A stream begins with the header RelayHeader:
// RelayLinked, or RelayCut while the control plane does not answer the relay. Vouched is the
// control_plane.identifier of an answer to a liveness probe that the control plane itself
// answered after the probe was sent; any other response of a relay says nothing about that.
const (
	RelayHeader = "outrigger-relay"
	RelayLinked = "linked"
	RelayCut    = "cut"
	Vouched     = "outrigger/vouched"
)

// MeshName is the name of the one MeshPolicy resource.
const MeshName = "mesh"

// Wildcard subscribes to every resource of a type.
const Wildcard = "*"

// Names of the Runtime resources, and of the layers of an Envoy's runtime that they fill;
// the second lies over the first.
const (
	RuntimeName = "outrigger"
	LeaseName   = "outrigger-lease"
)

// Pushed lists all type URLs in push order. Kill switches come first: they need nothing
// else. Secrets come before the clusters that name them, so that no cluster waits for one.
// Routes come after the clusters and listeners that they join.
func Pushed() []string {
	return []string{TypeRuntime, TypeSecret, TypeCluster, TypeEndpoint, TypeExtension, TypeListener, TypeScopedRoute, TypeRoute, TypeModelPolicy, TypeMeshPolicy}
}

// Followed lists the type URLs a sidecar follows, in the order in which it asks for them. The
// clusters it has are said first: from them a control plane that lost its log sees that it
// must not answer. Secrets are asked for before the MeshPolicy, with which a push is complete.
func Followed() []string { return slices.Insert(Types(), 1, TypeSecret) }

// Types lists the type URLs a sidecar's policy is made of, in push order.
func Types() []string {
	return []string{TypeCluster, TypeEndpoint, TypeListener, TypeRoute, TypeModelPolicy, TypeMeshPolicy}
}

// ShortType is the last word of a type URL, as people say it.
func ShortType(typeURL string) string { return typeURL[strings.LastIndexByte(typeURL, '.')+1:] }
