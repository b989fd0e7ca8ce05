package facts

import (
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/seedconfig"
)

// DeploymentAggregate is where deployment plans are configured.
const DeploymentAggregate = "deployment/plan"

// Deployment is the configured deployment plan.
type Deployment struct {
	Name, SHA256, Actor string
	Text                []byte
	File                seedconfig.File
	Since               time.Time
}

// Deployment returns the plan that was configured last, nil if none was.
func (f *Facts) Deployment() *Deployment { return f.deployment }

// deploymentConfigured takes a plan over. One that this program cannot read (a newer one
// wrote it) leaves the plan before it in force.
func (d *draft) deploymentConfigured(p *pb.DeploymentConfigured) string {
	file, err := seedconfig.Parse(p.GetName(), p.GetText())
	if err != nil {
		return err.Error()
	}
	d.deployment = &Deployment{Name: p.GetName(), SHA256: p.GetSha256(), Actor: d.event.GetActor(), Text: p.GetText(), File: file, Since: d.at()}
	return ""
}
