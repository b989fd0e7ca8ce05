package control

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/control/plan"
	"github.com/outrigger-mesh/outrigger/internal/seedconfig"
)

// ConfigureDeployment makes a deployment plan the one that rollouts follow which name no
// phases of their own; those under way keep theirs. A plan that cannot be used is
// refused (kind Invalid, with line and column) and changes nothing; the one in force
// already writes nothing.
func (a *admin) ConfigureDeployment(ctx context.Context, r *pb.ConfigureDeploymentRequest) (*pb.DeploymentConfiguration, error) {
	if err := checkReason(r.GetReason()); err != nil {
		return nil, err
	}
	if err := outrigger.CheckName("name", r.GetName()); err != nil {
		return nil, err
	}
	file, err := seedconfig.Parse(r.GetName(), r.GetText())
	if err != nil {
		return nil, err
	}
	p, err := plan.Of(file)
	if err != nil {
		return nil, err
	}
	if err := a.checkExec(p.Phases); err != nil {
		return nil, err
	}
	sum := sha256.Sum256(r.GetText())
	digest := hex.EncodeToString(sum[:])
	if r.GetDryRun() {
		return deploymentPB(&facts.Deployment{Name: r.GetName(), Text: r.GetText(), SHA256: digest, File: file, Actor: r.GetActor()})
	}
	f, err := a.change(ctx, r.GetActor(), "", func(f *facts.Facts) ([]eventlog.Write, error) {
		if d := f.Deployment(); d != nil && d.SHA256 == digest && d.Name == r.GetName() {
			return nil, nil
		}
		return []eventlog.Write{write(f, facts.DeploymentAggregate, &pb.Event{Metadata: reasonMetadata(r.GetReason()),
			Payload: &pb.Event_DeploymentConfigured{DeploymentConfigured: &pb.DeploymentConfigured{Name: r.GetName(), Text: r.GetText(), Sha256: digest}}})}, nil
	})
	if err != nil {
		return nil, err
	}
	return deploymentPB(f.Deployment())
}

// GetDeployment returns the deployment plan in force with what was understood; kind
// NotFound if none was configured.
func (a *admin) GetDeployment(context.Context, *pb.NameRequest) (*pb.DeploymentConfiguration, error) {
	d := a.facts.Facts().Deployment()
	if d == nil {
		return nil, outrigger.Errorf(outrigger.NotFound, "deployment plan not found: none was configured")
	}
	return deploymentPB(d)
}

func deploymentPB(d *facts.Deployment) (*pb.DeploymentConfiguration, error) {
	p, err := plan.Of(d.File)
	if err != nil {
		return nil, err
	}
	out := &pb.DeploymentConfiguration{Name: d.Name, Text: d.Text, Sha256: d.SHA256, Actor: d.Actor}
	if !d.Since.IsZero() {
		out.Since = timestamppb.New(d.Since)
	}
	for _, n := range p.Notes {
		out.Notes = append(out.Notes, n.String())
	}
	return out, nil
}

func durationPB(d time.Duration) *durationpb.Duration { return durationpb.New(d) }
