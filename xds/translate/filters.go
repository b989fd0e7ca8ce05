package translate

import (
	rbacconfig "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	faultcommon "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/fault/v3"
	fault "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/fault/v3"
	rbac "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	matcher "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	envoytype "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// Names of HTTP filters, by which virtual hosts configure them.
const (
	faultFilter  = "envoy.filters.http.fault"
	rbacFilter   = "envoy.filters.http.rbac"
	routerFilter = "envoy.filters.http.router"
)

// pack is anypb.New with deterministic bytes.
func pack(m proto.Message) (*anypb.Any, error) {
	out := new(anypb.Any)
	return out, anypb.MarshalFrom(out, m, proto.MarshalOptions{Deterministic: true})
}

func filter(name string, config proto.Message) (*hcm.HttpFilter, error) {
	cfg, err := pack(config)
	return &hcm.HttpFilter{Name: name, ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: cfg}}, err
}

// shareOf is parts of experiments.Buckets as a protobuf fraction.
func shareOf(n uint32) *envoytype.FractionalPercent {
	return &envoytype.FractionalPercent{Numerator: n, Denominator: envoytype.FractionalPercent_TEN_THOUSAND}
}

// hostFilters is what the virtual host of a model says to the filters before the router.
func (e *encoder) hostFilters(m *policy.Model) (map[string]*anypb.Any, error) {
	out := make(map[string]*anypb.Any)
	if m.Fault != (policy.Fault{}) {
		cfg, err := pack(encodeFault(m.Fault))
		if err != nil {
			return nil, err
		}
		out[faultFilter] = cfg
	}
	// gRPC refuses RBAC in a client's routes unless the listener has the filter.
	if len(m.Access) > 0 && e.kind != KindGRPC {
		cfg, err := pack(encodeAccess(m.Access))
		if err != nil {
			return nil, err
		}
		out[rbacFilter] = cfg
	}
	if len(out) == 0 {
		return nil, nil
	}
	return out, nil
}

func encodeFault(f policy.Fault) *fault.HTTPFault {
	out := &fault.HTTPFault{}
	if f.AbortShare > 0 {
		out.Abort = &fault.FaultAbort{ErrorType: &fault.FaultAbort_HttpStatus{HttpStatus: f.AbortStatus}, Percentage: shareOf(f.AbortShare)}
	}
	if f.DelayShare > 0 {
		out.Delay = &faultcommon.FaultDelay{
			FaultDelaySecifier: &faultcommon.FaultDelay_FixedDelay{FixedDelay: durationpb.New(f.Delay)}, Percentage: shareOf(f.DelayShare),
		}
	}
	return out
}

// accessPolicy is the name of the one RBAC policy of a model; Envoy logs it.
const accessPolicy = "access"

func encodeAccess(rules []policy.Access) *rbac.RBACPerRoute {
	var who []*rbacconfig.Principal
	for _, a := range rules {
		who = append(who, &rbacconfig.Principal{Identifier: &rbacconfig.Principal_Header{Header: &route.HeaderMatcher{
			Name: a.Header, HeaderMatchSpecifier: &route.HeaderMatcher_StringMatch{StringMatch: &matcher.StringMatcher{
				MatchPattern: &matcher.StringMatcher_Exact{Exact: a.Value},
			}},
		}}})
	}
	return &rbac.RBACPerRoute{Rbac: &rbac.RBAC{Rules: &rbacconfig.RBAC{
		Action: rbacconfig.RBAC_ALLOW,
		Policies: map[string]*rbacconfig.Policy{accessPolicy: {
			Permissions: []*rbacconfig.Permission{{Rule: &rbacconfig.Permission_Any{Any: true}}}, Principals: who,
		}},
	}}}
}

// decodeHost reads what hostFilters wrote.
func decodeHost(vh *route.VirtualHost, m *policy.Model) error {
	if cfg := vh.GetTypedPerFilterConfig()[faultFilter]; cfg != nil {
		var f fault.HTTPFault
		if err := cfg.UnmarshalTo(&f); err != nil {
			return outrigger.Errorf(outrigger.Invalid, "fault configuration: %v", err)
		}
		var err error
		if m.Fault.AbortShare, err = decodeShare(f.GetAbort().GetPercentage()); err != nil {
			return err
		}
		if m.Fault.DelayShare, err = decodeShare(f.GetDelay().GetPercentage()); err != nil {
			return err
		}
		m.Fault.AbortStatus, m.Fault.Delay = f.GetAbort().GetHttpStatus(), f.GetDelay().GetFixedDelay().AsDuration()
	}
	if cfg := vh.GetTypedPerFilterConfig()[rbacFilter]; cfg != nil {
		var r rbac.RBACPerRoute
		if err := cfg.UnmarshalTo(&r); err != nil {
			return outrigger.Errorf(outrigger.Invalid, "access configuration: %v", err)
		}
		for _, p := range r.GetRbac().GetRules().GetPolicies()[accessPolicy].GetPrincipals() {
			m.Access = append(m.Access, policy.Access{Header: p.GetHeader().GetName(), Value: p.GetHeader().GetStringMatch().GetExact()})
		}
		if len(m.Access) == 0 {
			return outrigger.Errorf(outrigger.Invalid, "access configuration opens the model to nobody that this version understands")
		}
	}
	return nil
}

// decodeShare reads a fraction as parts of experiments.Buckets.
func decodeShare(f *envoytype.FractionalPercent) (uint32, error) {
	n := f.GetNumerator()
	if n > 0 && f.GetDenominator() != envoytype.FractionalPercent_TEN_THOUSAND || n > experiments.Buckets {
		return 0, outrigger.Errorf(outrigger.Invalid, "a share of %d %v; write 0..%d TEN_THOUSAND", n, f.GetDenominator(), experiments.Buckets)
	}
	return n, nil
}
