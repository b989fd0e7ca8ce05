package facts

// Had reports whether the log has ever had a version that could serve: that version of a
// model, with "" for version any of that model, with both empty any at all. Versions are
// never taken out of the log, so that what it had once it has for good; one that is only
// written down, without an endpoint, was never served to anybody.
func (f *Facts) Had(model, version string) bool {
	if model == "" {
		for _, m := range f.models {
			if !m.Catalogued() {
				return true
			}
		}
		return false
	}
	m := f.models[model]
	switch {
	case m == nil:
		return false
	case version == "":
		return !m.Catalogued()
	}
	v := m.Version(version)
	return v != nil && len(v.Endpoints) > 0
}
